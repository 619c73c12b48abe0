"""Which prompts a model takes: prior, learned tokens per byte, token limits, the largest model."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.models import RosterModel, calls_per_second, context_limits
from router.traffic import TrafficTarget

SMALL = RosterModel("small", "small", "active", 512, 60.0, "60/min", context_tokens=8192)
LARGE = replace(SMALL, model="large", context_tokens=131_072)
MODELS = {"small": SMALL, "large": LARGE}


@pytest.mark.parametrize(
    ("tokens", "small", "large"),
    [(7_600, True, True), (7_700, False, True), (130_000, False, True), (170_000, False, False)],
)  # fmt: skip
def test_english_text_fits_by_the_prior(tokens: int, small: bool, large: bool) -> None:
    limits = context_limits(MODELS)
    assert limits["small"].fits(4 * tokens, 512) is small
    assert limits["large"].fits(4 * tokens, 512) is large


def test_learned_tokens_per_byte_replace_the_prior() -> None:
    models = {**MODELS, "small": replace(SMALL, tokens_per_byte=0.1, spread=0.0)}
    assert context_limits(models)["small"].fits(70_000, 512)
    models = {**MODELS, "small": replace(SMALL, tokens_per_byte=0.5, spread=0.0)}
    assert not context_limits(models)["small"].fits(20_000, 512)


def test_only_the_model_that_takes_most_gets_what_may_fit() -> None:
    limits = context_limits({**MODELS, "large": replace(LARGE, tokens_per_byte=0.25, spread=0.05)})
    assert (limits["large"].is_largest, limits["small"].is_largest) == (True, False)
    assert limits["large"].tokens_per_byte == pytest.approx(0.15)
    assert limits["small"].tokens_per_byte == 0.25


def test_token_limit_counts_like_a_context_of_its_length() -> None:
    targets = {"large": TrafficTarget.parse("60/min, 4k tokens/min, 90k tokens/h")}
    limits = context_limits(MODELS, targets)
    assert (limits["large"].tokens, limits["large"].token_limit) == (4000, 4000)
    assert limits["small"].is_largest
    stopped = context_limits(MODELS, {"large": TrafficTarget.parse("0")})
    assert (stopped["large"].tokens, stopped["large"].is_largest) == (131_072, True)


@given(
    contexts=st.lists(st.integers(1, 2_000_000), min_size=1, max_size=8),
    ratio=st.one_of(st.none(), st.floats(0.02, 2.0)),
    spread=st.floats(0, 3),
    size=st.integers(0, 16_000_000),
)
def test_what_fits_any_model_fits_one_of_the_largest(
    contexts: list[int], ratio: float | None, spread: float, size: int
) -> None:
    """A task that a model would take is never failed by the largest one."""
    models = {
        str(n): replace(SMALL, model=str(n), context_tokens=tokens, tokens_per_byte=ratio, spread=spread)
        for n, tokens in enumerate(contexts)
    }
    limits = context_limits(models)
    largest = [limit for limit in limits.values() if limit.is_largest]
    assert largest
    if any(limit.fits(size, 0) for limit in limits.values()):
        assert all(limit.fits(size, 0) for limit in largest)


@pytest.mark.parametrize(
    ("line", "per_second"),
    [
        ("90k tokens/min", 1500 / 762), ("90k tokens/min, 60/min", 1.0),
        ("120/min, 90k tokens/min", 1500 / 762),
        ("20 at once", None), ("60/min", 1.0),
    ],
)  # fmt: skip
def test_calls_are_planned_by_tokens_too(line: str, per_second: float | None) -> None:
    found = calls_per_second(TrafficTarget.parse(line), SMALL)
    assert found == (per_second if per_second is None else pytest.approx(per_second))
    learned = calls_per_second(TrafficTarget.parse("90k tokens/min"), replace(SMALL, tokens_per_call=300.0))
    assert learned == pytest.approx(5.0)
