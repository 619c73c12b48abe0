"""Alarm about failing calls: a rate over a span, with hysteresis."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.workers.failure_alarm import AlarmSettings, FailureAlarm

SETTINGS = AlarmSettings(failure_rate=0.1, min_failures=5, seconds=300.0)


def alarm_after(*calls: bool, every: float = 1.0) -> tuple[FailureAlarm, list[bool]]:
    """Records calls (True: failed); returns after which of them the alarm is raised."""
    alarm = FailureAlarm(SETTINGS)
    raised = []
    for number, failed in enumerate(calls):
        alarm.record(number * every, "timeout: no reply" if failed else None)
        raised.append(alarm.text(number * every) is not None)
    return alarm, raised


@pytest.mark.parametrize(
    ("calls", "raised"),
    [
        ([True, *[False] * 7], False),  # 1 of 8
        (([True] + [False] * 49) * 20, False),  # 2 % for long
        (([True] + [False] * 8) * 3, False),  # 11 %, but only 3 failures
        ([True] * 5, True),
        (([True] + [False] * 4) * 20, True),  # 20 %
    ],
)
def test_few_failures_raise_no_alarm(calls: list[bool], raised: bool) -> None:
    assert any(alarm_after(*calls)[1]) is raised


def test_single_calls_neither_end_nor_raise_it_again() -> None:
    _, raised = alarm_after(*[True] * 6, *[False, True] * 20)
    assert raised.index(True) == 4
    assert all(raised[4:])


def test_it_ends_below_half_of_the_rate_and_when_the_calls_are_old() -> None:
    alarm, raised = alarm_after(*[True] * 5, *[False] * 96)
    assert raised[4:99] == [True] * 95
    assert not raised[100]  # 5 of 101
    alarm, _ = alarm_after(*[True] * 5)
    assert alarm.text(200.0) == "5 of 5 calls failed within 300 s, last: timeout: no reply"
    assert alarm.text(305.0) is None


def test_a_certain_error_raises_it_at_once() -> None:
    alarm = FailureAlarm(SETTINGS)
    alarm.record(1.0, "unknown_model: 404", certain=True)
    assert alarm.text(1.0) == "1 of 1 calls failed within 300 s, last: unknown_model: 404"
    assert alarm.text(302.0) is None


@settings(deadline=None)
@given(st.lists(st.booleans(), max_size=200))
def test_it_changes_only_across_its_two_limits(calls: list[bool]) -> None:
    _, raised = alarm_after(*calls, every=0.1)
    for number, (before, now) in enumerate(zip([False, *raised], raised, strict=False), start=1):
        rate = sum(calls[:number]) / number
        if now and not before:
            assert rate >= SETTINGS.failure_rate
            assert sum(calls[:number]) >= SETTINGS.min_failures
        if before and not now:
            assert rate < SETTINGS.failure_rate / 2
