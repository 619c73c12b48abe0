"""An error that repeats the prompt is stored without it: operators read errors, and need not read prompts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.models.responses import MIN_REPEATED, without_prompt

PROMPT = "My account number is 7431-xylophone.\nPlease   close it."


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (
            "invalid input: My account number is 7431-xylophone. Please close it.",
            "invalid input: (repeats the prompt)",
        ),
        (
            '{"detail": [{"input": "account number is 7431-xylophone"}]}',
            '{"detail": [{"input": "(repeats the prompt)',
        ),
        ("number is 7431-x", "(repeats the prompt)"),
        ("no answer within 30 s", "no answer within 30 s"),
        ("the account is closed", "the account is closed"),
        ("", ""),
        (None, None),
    ],
)
def test_what_an_error_repeats_of_the_prompt_is_left_out(error: str | None, shown: str | None):
    assert without_prompt(error, PROMPT) == shown


@given(st.text(min_size=1), st.text(min_size=MIN_REPEATED), st.text())
def test_no_part_of_the_prompt_of_this_length_is_left(before: str, prompt: str, after: str):
    found = without_prompt(f"{before}{prompt}{after}", prompt) or ""
    flat = " ".join(prompt.split())
    kept = found.removesuffix("(repeats the prompt)")
    assert not any(kept[at : at + MIN_REPEATED] in flat for at in range(len(kept) - MIN_REPEATED + 1))
