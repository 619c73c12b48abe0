"""Why nothing is sent: precedence of the reasons, and their sentences."""

from __future__ import annotations

import dataclasses
import itertools
from datetime import datetime, timedelta, timezone
from typing import Any

import psycopg2.errors
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.errors import DatabaseError, SchemaError
from router.status.facts import facts_of, unreadable
from router.status.reasons import ORDER, Reason, redis_reason
from router.status.why_not import Facts, ModelFacts, Report, standstill_of

NOW = datetime(2026, 3, 4, 8, 0, tzinfo=timezone.utc)
MODEL = "phi-4"


def report(code: Reason, model: str = "", detail: str = "an error") -> Report:
    return Report(model, code, detail, NOW - timedelta(seconds=7))


# Reason -> what makes it hold, of Facts and of the model; in order of precedence.
CAUSES: dict[Reason, tuple[dict[str, Any], dict[str, Any]]] = {
    Reason.DATABASE_READ_ONLY: ({"read_only": True}, {}),
    Reason.SCHEMA: ({"schema_problem": "The column tasks.max_tokens is missing"}, {}),
    Reason.OUTDATED: ({"outdated": "Restart this process."}, {}),
    Reason.TRIGGERS_MISSING: ({"triggers_problem": "Triggers are missing."}, {}),
    Reason.PAUSED: ({"paused": True}, {}),
    Reason.LEASE_LOST: ({"alive": 0, "lost_at": NOW}, {}),
    Reason.REDIS_UNAVAILABLE: ({"redis_problem": "Redis does not answer."}, {}),
    Reason.MODEL_PAUSED: ({}, {"state": "paused"}),
    Reason.INVALID_TARGET: ({}, {"target": None, "problem": "'mn' is not a unit of time."}),
    Reason.CLAIMS_FAILING: ({"reports": (report(Reason.CLAIMS_FAILING, MODEL),)}, {}),
    Reason.BACKEND_UNREACHABLE: ({"reports": (report(Reason.BACKEND_UNREACHABLE, MODEL),)}, {}),
    Reason.BREAKER_OPEN: ({}, {"waiting_for": "cooling_down", "next_seconds": 9.0, "breaker": "open"}),
    Reason.NO_TASKS: ({"unsolved": 0}, {}),
    Reason.WINDOW: ({}, {"waiting_for": "window", "next_seconds": 9.0, "limits": {"45/min": 45}}),
}


def facts_with(*causes: Reason) -> Facts:
    of_all: dict[str, Any] = {"now": NOW, "reports": ()}
    of_model: dict[str, Any] = {}
    for cause in sorted(causes, key=ORDER.__getitem__):  # the limiter names one limit only
        changed, model = CAUSES[cause]
        of_all |= {**changed, "reports": (*of_all["reports"], *changed.get("reports", ()))}
        of_model = {**model, **of_model}
    return Facts(**of_all, models={MODEL: ModelFacts(**of_model)})


def test_the_order_of_the_table_is_that_of_the_codes() -> None:
    assert list(CAUSES) == sorted(CAUSES, key=ORDER.__getitem__)


def test_nothing_is_reported_while_models_may_send() -> None:
    found = standstill_of(facts_with())
    assert (found.whole, dict(found.models)) == (None, {MODEL: None})


@pytest.mark.parametrize("reason", CAUSES)
def test_each_reason_is_named_alone(reason: Reason) -> None:
    found = standstill_of(facts_with(reason))
    assert found.whole is not None
    assert (found.whole.code, found.models[MODEL] and found.models[MODEL].code) == (reason, reason)
    assert found.whole.text.endswith(".")


@pytest.mark.parametrize(("first", "second"), list(itertools.combinations(CAUSES, 2)))
def test_of_two_reasons_the_one_of_higher_precedence_is_named(first: Reason, second: Reason) -> None:
    found = standstill_of(facts_with(second, first))
    assert found.whole is not None
    assert found.whole.code is first


@settings(deadline=None)
@given(st.sets(st.sampled_from([*CAUSES])))
def test_any_set_of_reasons_names_the_first_and_lists_all_that_stop_everything(causes: set[Reason]) -> None:
    found = standstill_of(facts_with(*causes))
    named = min(causes, key=ORDER.__getitem__, default=None)
    assert (None if found.whole is None else found.whole.code) == named
    everywhere = {why.code for why in found.everywhere}
    hidden = {Reason.LEASE_LOST} if Reason.PAUSED in causes else set()  # a pause ends the workers
    assert everywhere == {cause for cause in causes if ORDER[cause] < ORDER[Reason.MODEL_RETIRED]} - hidden


def test_one_model_that_may_send_is_enough() -> None:
    models = {"a": ModelFacts(target=None), "b": ModelFacts()}
    found = standstill_of(Facts(NOW, models=models))
    assert found.whole is None
    assert found.models["a"] is not None
    assert found.models["a"].code is Reason.NO_TARGET


def test_the_whole_waits_for_the_models_that_are_nearest_to_sending() -> None:
    models = {
        "a": ModelFacts(target=None),
        "b": ModelFacts(waiting_for="concurrency", next_seconds=50, in_flight=3, at_once=3),
        "c": ModelFacts(waiting_for="concurrency", next_seconds=50, in_flight=3, at_once=3),
        "d": ModelFacts(state="paused"),
    }
    whole = standstill_of(Facts(NOW, models=models)).whole
    assert whole is not None
    assert whole.code is Reason.CONCURRENCY
    assert "1 without a target, 2 at the concurrency limit" in whole.text


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        ({"waiting_for": "window", "next_seconds": 3, "target": "45/min", "limits": {"45/min": 45}},
         "The window of 45/min is used up; no permit before 08:00:03 UTC."),
        ({"waiting_for": "window", "next_seconds": 300, "target": "6/h", "limits": {"6/h": 1}},
         "Calls are spread over the window of 6/h; no permit before 08:05:00 UTC."),
        ({"waiting_for": "window", "next_seconds": 3, "limits": {"4/s": 0, "14.4k/d": 14_400}},
         "The window of 14.4k/d is used up; no permit before 08:00:03 UTC."),
        ({"waiting_for": "tokens", "next_seconds": 3, "limits": {"9/s": 9, "90k tokens/min": 89_000}},
         "The window of 90k tokens/min is used up; no permit before 08:00:03 UTC."),
        ({"waiting_for": "concurrency", "next_seconds": 60, "in_flight": 2, "at_once": 2},
         "Concurrency limit reached: 2 of 2 in flight."),
        ({"waiting_for": "cooling_down", "next_seconds": 30, "breaker": "closed", "cooldown_reason": "429"},
         "Cooling down until 08:00:30 UTC: 429."),
        ({"waiting_for": "stopped", "next_seconds": None}, "The traffic target is 0."),
    ],
)  # fmt: skip
def test_the_sentence_names_the_limit_and_the_time(model: dict[str, Any], sentence: str) -> None:
    found = standstill_of(Facts(NOW, models={MODEL: ModelFacts(**model)})).models[MODEL]
    assert found is not None
    assert found.text == sentence


@pytest.mark.parametrize("waiting_for", ["window", "tokens", "concurrency", "half_open", "cooling_down"])
def test_a_model_that_sends_within_two_seconds_is_sending(waiting_for: str) -> None:
    model = ModelFacts(waiting_for=waiting_for, next_seconds=1.3)
    assert standstill_of(Facts(NOW, models={MODEL: model})).whole is None


def test_a_model_without_worker_is_named_only_if_no_process_works_for_it() -> None:
    facts = Facts(NOW, alive=2, models={MODEL: ModelFacts()}, reports=(report(Reason.NO_WORKER, MODEL, ""),))
    assert standstill_of(facts).whole is None
    both = dataclasses.replace(facts, reports=facts.reports * 2)
    whole = standstill_of(both).whole
    assert whole is not None
    assert whole.code is Reason.NO_WORKER
    idle = standstill_of(dataclasses.replace(both, unsolved=0)).whole
    assert idle is not None
    assert idle.code is Reason.NO_TASKS


def test_without_redis_the_reasons_that_only_redis_knows_are_left_out() -> None:
    model = ModelFacts(waiting_for="window", next_seconds=60, limits={"1/min": 1})
    found = standstill_of(Facts(NOW, models={MODEL: model}, redis_problem="Redis is read-only: READONLY"))
    assert found.models[MODEL] is not None
    assert found.models[MODEL].code is Reason.REDIS_READ_ONLY


def test_starts_come_from_the_facts_or_from_a_worker() -> None:
    began = NOW - timedelta(minutes=3)
    facts = dataclasses.replace(facts_with(Reason.WINDOW), starts={(MODEL, "window"): began})
    found = standstill_of(facts).models[MODEL]
    assert found is not None
    assert found.since == began
    other = dataclasses.replace(facts, starts={(MODEL, "tokens"): began})
    assert standstill_of(other).models[MODEL] == dataclasses.replace(found, since=None)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (DatabaseError("Postgres cannot be reached: refused"), Reason.DATABASE_UNAVAILABLE),
        (DatabaseError("Postgres accepts no writes: it is a standby."), Reason.DATABASE_READ_ONLY),
        (SchemaError("This database does not have the router's tables yet."), Reason.SCHEMA),
    ],
)
def test_a_reader_that_cannot_read_names_the_reason_itself(error: DatabaseError, code: Reason) -> None:
    whole = unreadable(error).whole
    assert whole is not None
    assert whole.code is code


def test_a_missing_function_is_a_problem_of_the_schema() -> None:
    error = DatabaseError("function why_not_facts() does not exist")
    error.__cause__ = type("Missing", (psycopg2.errors.UndefinedFunction,), {"pgcode": "42883"})()
    whole = unreadable(error).whole
    assert whole is not None
    assert whole.code is Reason.SCHEMA


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        ("READONLY You can't write against a read only replica.", Reason.REDIS_READ_ONLY),
        ("NOREPLICAS Not enough good replicas to write.", Reason.REDIS_READ_ONLY),
        ("OOM command not allowed when used memory > 'maxmemory'.", Reason.REDIS_UNAVAILABLE),
        ("Connection refused", Reason.REDIS_UNAVAILABLE),
    ],
)
def test_a_redis_that_answers_but_does_not_write_is_read_only(error: str, reason: Reason) -> None:
    assert redis_reason(error) is reason


def test_reports_of_newer_versions_are_ignored() -> None:
    stored: dict[str, Any] = {
        "now": 1.0, "read_only": False, "held": False, "held_since": None, "alive": 1, "lost_at": None,
        "ended_at": None, "tasks": dict.fromkeys(("unsolved", "running", "waiting", "uncategorised"), 1),
        "models": [], "reports": [{"model": "", "code": "of_the_future", "detail": "", "since": 1.0}],
    }  # fmt: skip
    assert facts_of(stored, {}, None).reports == ()
