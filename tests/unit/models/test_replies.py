"""Replies of the Models Backend: outcome of every status, time to retry, lenient reading of bodies."""

from __future__ import annotations

import email.utils
import gzip
import json
import time
import zlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.limiter.breaker import BreakerSettings, Signal
from router.models.bodies import decompressed, parse_json, web_page
from router.models.replies import (
    MAX_RETRY_AFTER_SECONDS,
    OTHER_RULES,
    STATUS_RULES,
    Rule,
    outcome_of,
    retry_after,
)
from router.task import Outcome

NOW = 1_790_000_000.0
DATE = {"Date": email.utils.formatdate(NOW, usegmt=True)}
SIGNALS = {
    None: "none", Signal.NEUTRAL: "none", Signal.SUCCESS: "success", Signal.FAILURE: "failure",
    Signal.COOL_DOWN: "cool-down", Signal.RATE_LIMITED: "cool-down",
}  # fmt: skip


def row(rule: Rule) -> str:
    outcome = rule.outcome
    verdict = BreakerSettings().verdict(outcome, 5.0 if outcome is Outcome.OVERLOADED else None)
    attempt = "yes" if outcome.counts_as_attempt else "no"
    slot = "held until its longest time" if rule.no_reply else "free"
    signal = SIGNALS[verdict.signal if verdict else None]
    evidence = "yes" if outcome.is_evidence else "no"
    return f"| {rule.text} | `{outcome.value}` | {attempt} | {signal} | {slot} | {evidence} |"


def test_documented_table_is_that_of_the_code() -> None:
    text = (Path(__file__).parents[3] / "docs" / "architecture.md").read_text()
    expected = "\n".join(row(rule) for rule in (*OTHER_RULES[:3], *STATUS_RULES, *OTHER_RULES[3:]))
    assert expected in text, f"docs/architecture.md must contain:\n{expected}"


def test_every_outcome_has_a_rule() -> None:
    assert {rule.outcome for rule in (*STATUS_RULES, *OTHER_RULES)} == set(Outcome)


def test_only_prompts_and_models_are_blamed() -> None:
    """Of all statuses, only these cost an attempt or count as evidence."""
    counted = {status for status in range(300, 600) if outcome_of(status, "", None).counts_as_attempt}
    outages = {408, 425, 499, 502, 503, 504, *range(520, 531), 598, 599}
    access = {*range(300, 400), 401, 402, 403, 405, 406, 407, 411, 415, 417, 421, 426, 431, 498}
    access |= {501, 505, 511}
    assert counted == set(range(300, 600)) - outages - access - {404, 410, 413, 429}


@pytest.mark.parametrize("status", [400, 413, 422])
@pytest.mark.parametrize(
    "message",
    [
        "This model's maximum context length is 8192 tokens. However, you requested 10010 tokens.",
        "prompt is too long: 210000 tokens > 200000 maximum",
        "The input token count (1500000) exceeds the maximum number of tokens allowed (1048576).",
        "the request exceeds the available context size, try increasing it",
        '{"error": {"type": "too_long", "message": "9000 tokens do not fit phi-4\'s 8192"}}',
        '{"error": {"code": "context_length_exceeded"}}',
    ],
)
def test_a_prompt_beyond_the_context_is_too_long(status: int, message: str) -> None:
    assert outcome_of(status, message, None) is Outcome.TOO_LONG


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "7"}, 7.0), ({"retry-after": "1.5"}, 1.5), ({"retry-after": " 20 "}, 20.0),
        ({"retry-after": "-3"}, 0.0), ({"retry-after": "7200"}, MAX_RETRY_AFTER_SECONDS),
        # A point in time instead of a duration, and absurd values:
        ({"retry-after": str(int(NOW) + 30)}, 30.0), ({"retry-after": f"{int(NOW + 30)}000"}, 30.0),
        ({"retry-after": "1771404540"}, 0.0), ({"retry-after": "86401"}, None),
        *(({"retry-after": text}, None) for text in ("inf", "nan", "1e30", "soon", "", "1 Jan", "0x10")),
        ({"retry-after": email.utils.formatdate(NOW + 30, usegmt=True)}, 30.0),
        ({"retry-after": email.utils.formatdate(NOW - 30, usegmt=True)}, 0.0),
        ({"retry-after": email.utils.formatdate(NOW + 1e7, usegmt=True)}, None),
        ({"retry-after-ms": "250", "retry-after": "1"}, 0.25), ({"x-ms-retry-after-ms": "1500"}, 1.5),
        ({"retry-after-ms": "x", "retry-after": "2"}, 2.0), ({"retry-after": "2s"}, 2.0),
        ({"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "6m0s"}, 360.0),
        ({"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "20ms"}, 0.02),
        ({"x-ratelimit-remaining-tokens": "9", "x-ratelimit-reset-tokens": "6m0s"}, None), ({}, None),
    ],
)  # fmt: skip
def test_time_to_retry_is_read(headers: dict[str, str], seconds: float | None) -> None:
    found = retry_after({**DATE, **headers})
    assert found == (seconds if seconds is None else pytest.approx(seconds, abs=0.001))


@given(value=st.one_of(st.text(max_size=40), st.floats().map(str), st.integers().map(str)))
def test_no_value_rests_a_model_for_more_than_an_hour(value: str) -> None:
    for name in ("retry-after", "retry-after-ms", "x-ms-retry-after"):
        found = retry_after({name: value})
        assert found is None or 0 <= found <= MAX_RETRY_AFTER_SECONDS


ANSWER = '{"answer": "caf\u00e9", "n": 1}'


@pytest.mark.parametrize(
    ("content", "charset", "answer"),
    [
        (b'{"answer": "a\nb\tc\x01d"}', None, "a\nb\tc\x01d"),
        (b'{"answer": "caf\xe9"}', None, "caf\ufffd"),
        (b'{"answer": "caf\xe9"}', "iso-8859-1", "caf\u00e9"),
        (b'{"answer": "caf\xe9"}', "no-such-charset", "caf\ufffd"),
        (b"\xef\xbb\xbf" + ANSWER.encode(), None, "caf\u00e9"),
        (ANSWER.encode("utf-16"), None, "caf\u00e9"),
        (b"\r\n " + ANSWER.encode() + b"\n\0\0<!-- proxy -->", None, "caf\u00e9"),
        (b'{"answer": "x", "n": ' + b"9" * 5000 + b"}", None, "x"),
        (b'{"answer": "x", "cost": NaN}', None, "x"),
    ],
)
def test_readable_answer_is_kept(content: bytes, charset: str | None, answer: str) -> None:
    assert parse_json(content, charset)["answer"] == answer


@given(st.text(), st.binary(max_size=20), st.integers(0, 200))
def test_damage_outside_the_answer_does_not_change_it(answer: str, damage: bytes, at: int) -> None:
    """A byte of damage in another text of the document leaves the answer as it is."""
    body = json.dumps({"answer": answer, "note": "@"}, ensure_ascii=True).encode()
    damaged = body.replace(b'"@"', b'"' + damage.replace(b'"', b"").replace(b"\\", b"") + b'"')
    if json.detect_encoding(damaged).startswith("utf-8"):
        assert parse_json(damaged)["answer"] == answer


@pytest.mark.parametrize("content", [b"", b"It works!", b'{"answer": "cut o', b"\0" * 50])
def test_unreadable_body_is_refused(content: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_json(content)


def test_named_encoding_is_undone_within_the_limit_or_ignored() -> None:
    body = ANSWER.encode()
    for packed in (gzip.compress(body), zlib.compress(body), zlib.compress(body)[2:-4]):
        assert decompressed(packed, "gzip", 1000) == body
    for encoding in ("gzip", "br", "identity", "x", "gzip, br"):
        assert decompressed(body, encoding, 1000) == body
    assert len(decompressed(gzip.compress(b" " * 10_000_000), "gzip", 1000)) == 1001


@pytest.mark.parametrize(
    ("content", "kind", "title"),
    [
        (b"<!DOCTYPE html><html><title>Sign in</title>", "", "Sign in"), (b"\n<HTML>", "text/plain", ""),
        (b"Service down", "text/html", ""), (ANSWER.encode(), "text/html", None), (b"<x>", "", None),
        (b"It works!", "application/json", None),
    ],
)  # fmt: skip
def test_web_page_is_recognized(content: bytes, kind: str, title: str | None) -> None:
    assert web_page(content, kind) == title


def test_hostile_body_is_read_in_linear_time() -> None:
    began = time.process_time()
    for body in (b"<!--" * 200_000, b" " * 1_000_000, b"<title>" * 100_000):
        web_page(body, "")
        outcome_of(400, body.decode()[:4096], None)
    assert time.process_time() - began < 1.0
