"""Why nothing is sent: one reason for each model and one for the whole. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone

from router.status.reasons import ORDER, Reason, WhyNot, redis_reason
from router.traffic import TrafficTarget

USED_UP = 0.9  # share of a budget that is shown as used up while calls wait for it
SOON_SECONDS = 2.0  # a model whose next send is nearer than this is sending


# By name of the limiter's WaitReason in lower case.
_LIMITS = {
    reason.value: reason
    for reason in (
        Reason.STOPPED, Reason.NO_TARGET, Reason.HALF_OPEN, Reason.COOLING_DOWN, Reason.REBUILDING,
        Reason.TOO_MANY_TOKENS, Reason.TOO_EXPENSIVE, Reason.BUDGET, Reason.TOKENS, Reason.WINDOW,
        Reason.CONCURRENCY,
    )
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """Facts about one model. `limits`: usage by limit, e.g. `{"45/min": 45}`; None while Redis is away.

    `waiting_for` is the name of a WaitReason in lower case; `next_seconds` is None if only a change can help.
    """

    state: str = "active"
    target: str | None = "60/min"
    target_since: datetime | None = None
    problem: str | None = None
    problem_since: datetime | None = None
    waiting_for: str | None = None
    next_seconds: float | None = 0.0
    limits: Mapping[str, int] | None = None
    in_flight: int = 0
    at_once: int | None = None
    money: Mapping[str, int] | None = None  # in millionths of a US dollar, by limit
    breaker: str | None = None
    cooldown_reason: str | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """Reason that a worker process reported; `model` is empty for all models."""

    model: str
    code: Reason
    detail: str
    since: datetime


@dataclass(frozen=True, slots=True)
class Facts:
    """Everything that decides why nothing is sent. `now` is by the database's clock.

    alive: worker processes with a fresh lease. lost_at: last renewal of a lease that was not ended properly.
    """

    now: datetime
    read_only: bool = False
    schema_problem: str | None = None
    outdated: str | None = None
    triggers_problem: str | None = None
    paused: bool = False
    paused_since: datetime | None = None
    alive: int = 1
    lost_at: datetime | None = None
    ended_at: datetime | None = None
    redis_problem: str | None = None
    unsolved: int = 1
    running: int = 0
    waiting: int = 0
    uncategorised: int = 0
    models: Mapping[str, ModelFacts] = field(default_factory=dict)
    reports: tuple[Report, ...] = ()
    starts: Mapping[tuple[str, str], datetime] = field(default_factory=dict)  # (model, code) -> start

    @property
    def ready(self) -> int:
        return max(0, self.unsolved - self.running - self.waiting - self.uncategorised)


@dataclass(frozen=True, slots=True)
class Standstill:
    """Why nothing is sent: for the whole, None if any model may send, and for each model.

    `everywhere` are all reasons that hold for all models, in order of precedence.
    """

    whole: WhyNot | None
    models: Mapping[str, WhyNot | None] = field(default_factory=dict)
    everywhere: tuple[WhyNot, ...] = ()


def standstill_of(facts: Facts) -> Standstill:
    """Returns the reason of each model and of the whole."""
    everywhere = sorted(_of_all(facts), key=lambda why: ORDER[why.code])
    models: dict[str, WhyNot | None] = {}
    for name, model in facts.models.items():
        found = _first([*everywhere, *_of_model(facts, name, model)])
        models[name] = _with_start(found, facts.starts, name)
    whole = _with_start(_of_the_whole(everywhere, models), facts.starts, "")
    return Standstill(whole, models, tuple(everywhere))


def only(code: Reason, text: str) -> Standstill:
    """Returns one reason for everything."""
    whole = WhyNot(code, _sentence(text))
    return Standstill(whole, everywhere=(whole,))


def _of_all(facts: Facts) -> Iterator[WhyNot]:
    if facts.read_only:
        why = "it is a standby, or default_transaction_read_only is on"
        yield WhyNot(Reason.DATABASE_READ_ONLY, f"Postgres is read-only: {why}.")
    if facts.schema_problem:
        yield WhyNot(Reason.SCHEMA, _sentence(facts.schema_problem))
    if facts.outdated:
        yield WhyNot(Reason.OUTDATED, _sentence(facts.outdated))
    if facts.triggers_problem:
        yield WhyNot(Reason.TRIGGERS_MISSING, _sentence(facts.triggers_problem))
    if not facts.models:
        remedy = "Add a model to config/models.yaml and run `router models sync`."
        yield WhyNot(Reason.ROSTER_EMPTY, f"The roster is empty. {remedy}")
    if facts.paused:
        yield WhyNot(
            Reason.PAUSED,
            "The batch is paused: the DAG solve_tasks is paused in Airflow.",
            facts.paused_since,
        )
    elif not facts.alive:
        yield _no_worker(facts)
    if facts.redis_problem:
        yield WhyNot(redis_reason(facts.redis_problem), _sentence(facts.redis_problem))
    yield from (
        _reported(report) for report in facts.reports if not report.model and report.code in _REPORTED
    )


def _no_worker(facts: Facts) -> WhyNot:
    if facts.lost_at is not None:
        why = "its process was killed, is stalled or cannot reach Postgres"
        text = f"No worker has renewed its lease since {_time(facts.lost_at)}: {why}."
        return WhyNot(Reason.LEASE_LOST, text, facts.lost_at)
    text = "No worker is running. Enable the DAG solve_tasks and check the triggerer."
    return WhyNot(Reason.NO_WORKER, text, facts.ended_at)


def _of_model(facts: Facts, name: str, model: ModelFacts) -> Iterator[WhyNot]:
    if model.state in ("retired", "paused"):
        code = Reason.MODEL_RETIRED if model.state == "retired" else Reason.MODEL_PAUSED
        yield WhyNot(code, f"The model is {model.state} on the roster.")
    if model.target is None and model.problem:
        text = f"The Variable traffic.{name} is invalid, and no target was set before: {model.problem}"
        yield WhyNot(Reason.INVALID_TARGET, _sentence(text), model.problem_since)
    if model.target is None:
        text = f"The model has no traffic target. Set the Airflow Variable traffic.{name}."
        yield WhyNot(Reason.NO_TARGET, text)
    yield from (_reported(r) for r in facts.reports if r.model == name and _holds(r, facts))
    yield from _of_backlog(facts)
    if facts.redis_problem is None:
        yield from _of_limiter(facts, model)


def _holds(report: Report, facts: Facts) -> bool:
    if report.code is Reason.NO_TASKS_FOR_MODEL:
        return facts.ready > 0
    if report.code is Reason.NO_WORKER:  # each process reports the models that it does not work for
        same = sum((r.model, r.code) == (report.model, report.code) for r in facts.reports)
        return facts.unsolved > 0 and same >= facts.alive
    return report.code in _REPORTED


def _of_backlog(facts: Facts) -> Iterator[WhyNot]:
    if not facts.unsolved:
        yield WhyNot(Reason.NO_TASKS, "No task is unsolved.")
    elif not facts.ready:
        states = {
            "in flight": facts.running,
            "waiting for a retry": facts.waiting,
            "waiting for a category": facts.uncategorised,
        }
        shown = ", ".join(f"{count:,} {state}" for state, count in states.items() if count)
        yield WhyNot(Reason.NOT_READY, f"No task is ready: {shown}.")


def _of_limiter(facts: Facts, model: ModelFacts) -> Iterator[WhyNot]:
    reason = _LIMITS.get(model.waiting_for or "")
    soon = model.next_seconds is not None and model.next_seconds < SOON_SECONDS
    if reason is None or (soon and reason not in _LASTING):
        return
    until = None
    if model.next_seconds is not None:
        until = _moment(facts.now + timedelta(seconds=model.next_seconds), facts.now)
    if reason is Reason.COOLING_DOWN and model.breaker == "open":
        reason = Reason.BREAKER_OPEN
    since = model.target_since if reason is Reason.STOPPED else None
    yield WhyNot(reason, _limit_text(reason, model, until), since)


_LASTING = frozenset(
    {Reason.STOPPED, Reason.NO_TARGET, Reason.REBUILDING, Reason.TOO_MANY_TOKENS, Reason.TOO_EXPENSIVE}
)


def _limit_text(reason: Reason, model: ModelFacts, until: str | None) -> str:
    then = "" if until is None else f" until {until}"
    because = f": {model.cooldown_reason.rstrip('.')}" if model.cooldown_reason else ""
    texts = {
        Reason.STOPPED: "The traffic target is 0.",
        Reason.NO_TARGET: "The model has no traffic target.",
        Reason.BREAKER_OPEN: f"The circuit breaker is open{then} after repeated failures{because}.",
        Reason.HALF_OPEN: "The circuit breaker is half-open: one probe is in flight.",
        Reason.COOLING_DOWN: f"Cooling down{then}{because}.",
        Reason.REBUILDING: "The limiter's state is being rebuilt after a restart of Redis.",
        Reason.TOO_MANY_TOKENS: "The next call needs more tokens than a whole window allows.",
        Reason.TOO_EXPENSIVE: "The next call may cost more than a whole budget.",
        Reason.BUDGET: f"Budget of {_budgets(model)} used up{then}.",
        Reason.CONCURRENCY: f"Concurrency limit reached: {model.in_flight:,} of {model.at_once} in flight.",
    }
    return texts.get(reason) or _window_text(reason, model, until)


def _budgets(model: ModelFacts) -> str:
    target = TrafficTarget.parse(model.target or "0")
    used = model.money or {}
    almost = [str(one) for one in target.money if used.get(str(one), 0) >= USED_UP * one.count]
    return " and ".join(almost or map(str, target.money))


def _window_text(reason: Reason, model: ModelFacts, until: str | None) -> str:
    then = "" if until is None else f"; no permit before {until}"
    of_tokens = reason is Reason.TOKENS
    full = [
        limit
        for limit, used in (model.limits or {}).items()
        if ("token" in limit) is of_tokens and (of_tokens or used >= _count(limit))
    ]
    if full:
        return f"The window of {', '.join(full)} is used up{then}."
    return f"Calls are spread over the window of {model.target}{then}."


def _count(limit: str) -> float:
    """Returns the number of a request limit such as `45/min`."""
    head = limit.partition("/")[0]
    scale = {"k": 1e3, "M": 1e6}.get(head[-1:], 1.0)
    return float(head.rstrip("kM")) * scale


_REPORTED = {
    Reason.OUTDATED: "This version is older than the database: {}",
    Reason.NO_WORKER: "No worker runs for this model. Clear its task in the run of solve_tasks.{}",
    Reason.LEASE_LOST: "The worker's lease was lost: {}",
    Reason.REDIS_UNAVAILABLE: "{}",
    Reason.REDIS_READ_ONLY: "{}",
    Reason.CLAIMS_FAILING: "Claims fail: {}",
    Reason.BACKEND_UNREACHABLE: "The Models Backend is unreachable: {}",
    Reason.NO_TASKS_FOR_MODEL: "No ready task is for this model: {}",
    Reason.WORKER_FULL: "The worker has reached worker.max_in_flight: {}",
}


def _reported(report: Report) -> WhyNot:
    text = _REPORTED.get(report.code, "{}").format(report.detail)
    return WhyNot(report.code, _sentence(text), report.since)


def _of_the_whole(everywhere: list[WhyNot], models: Mapping[str, WhyNot | None]) -> WhyNot | None:
    """Returns the reason of the models that are nearest to sending, with those of the others."""
    if everywhere:
        return everywhere[0]
    found = [reason for reason in models.values() if reason is not None]
    if len(found) < len(models):
        return None
    usable = [why for why in found if why.code not in (Reason.MODEL_RETIRED, Reason.MODEL_PAUSED)]
    nearest = max(usable or found, key=lambda why: ORDER[why.code])
    if not usable:
        return WhyNot(nearest.code, "No model on the roster is active.")
    codes = sorted({why.code for why in usable}, key=ORDER.__getitem__)
    if len(usable) == 1 or nearest.code in _SHARED:
        return nearest
    counts = ", ".join(f"{sum(why.code is code for why in usable)} {_noun(code)}" for code in codes)
    return WhyNot(nearest.code, f"No model can send: {counts}. {nearest.text}", nearest.since)


def _noun(code: Reason) -> str:
    return _NOUNS.get(code, code.value.replace("_", " "))


_SHARED = frozenset({Reason.NO_TASKS, Reason.NOT_READY})
_NOUNS = {
    Reason.STOPPED: "with target 0",
    Reason.NO_TARGET: "without a target",
    Reason.INVALID_TARGET: "with an invalid target",
    Reason.CLAIMS_FAILING: "whose claims fail",
    Reason.BACKEND_UNREACHABLE: "without a reachable backend",
    Reason.BREAKER_OPEN: "with an open breaker",
    Reason.WINDOW: "with a full window",
    Reason.TOKENS: "with a full token window",
    Reason.CONCURRENCY: "at the concurrency limit",
    Reason.NO_WORKER: "without a worker",
}


def _first(reasons: Iterable[WhyNot]) -> WhyNot | None:
    return min(reasons, key=lambda why: ORDER[why.code], default=None)


def _with_start(
    found: WhyNot | None, starts: Mapping[tuple[str, str], datetime], model: str
) -> WhyNot | None:
    if found is None or found.since is not None:
        return found
    return WhyNot(found.code, found.text, starts.get((model, found.code.value)))


def _moment(at: datetime, now: datetime) -> str:
    """Renders a time to come, with its date if that is not today's."""
    date = at.astimezone(timezone.utc).date()
    return _time(at) if date == now.astimezone(timezone.utc).date() else f"{date} {_time(at)}"


def _time(at: datetime) -> str:
    return f"{at.astimezone(timezone.utc):%H:%M:%S} UTC"


def _sentence(text: str) -> str:
    text = text.strip()
    return text if text.endswith((".", "!", "?")) else f"{text}."
