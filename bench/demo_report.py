"""Report of a demo: its tasks, its time against the bound, and the judge's verdict on the windows."""

from __future__ import annotations

import itertools
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.judge import Arrival, TargetChange, Verdict, judge, print_verdict, read_arrivals
from bench.judge.ideal import bound
from router.database import Connection, rows
from router.traffic import TrafficTarget

_TASKS = """
SELECT count(*) AS tasks, count(*) FILTER (WHERE status = 'solved') AS solved,
       count(*) FILTER (WHERE status = 'failed') AS failed,
       extract(epoch FROM min(created_at))::float8 AS began,
       extract(epoch FROM min(solved_at))::float8 AS first_answer,
       extract(epoch FROM max(solved_at))::float8 AS last_answer
  FROM tasks WHERE starts_with(external_id, %s)"""
# Any solver gets these refusals and empty answers and has to retry.
_ASKED_AGAIN = """
SELECT count(*) AS calls FROM model_calls c JOIN tasks t ON t.id = c.task_id
 WHERE starts_with(t.external_id, %s) AND c.outcome NOT IN ('answered', 'unsent', 'lost')"""
_TARGETS = """
SELECT model, target, extract(epoch FROM in_force_at)::float8 AS at FROM traffic_targets ORDER BY version"""


@dataclass(frozen=True)
class TaskFacts:
    """The demo's tasks in the database; times in seconds of the Unix epoch, None if nothing was solved."""

    tasks: int
    solved: int
    failed: int
    began: float | None
    first_answer: float | None
    last_answer: float | None

    @property
    def finished(self) -> int:
        return self.solved + self.failed


@dataclass(frozen=True)
class DemoReport:
    """`seconds` from the first task to the last answer; `bound_seconds` with ideal limiters for the same
    calls.

    Failed calls and their retries count in both. `seconds_to_first_answer` counts from the command's start,
    set-up included.
    """

    facts: TaskFacts
    seconds: float | None
    seconds_to_first_answer: float | None
    bound_seconds: float | None
    verdict: Verdict

    def as_json(self) -> dict[str, Any]:
        """The content of `make demo ARGS="--json FILE"`."""
        models = {
            name: {
                "target": model.target,
                "sent": model.sent,
                "worst_window_ratio": model.worst_window_ratio,
                "use": model.use,
            }
            for name, model in self.verdict.models.items()
        }
        return {
            "tasks": self.facts.tasks,
            "solved": self.facts.solved,
            "failed": self.facts.failed,
            "seconds": self.seconds,
            "seconds_to_first_answer": self.seconds_to_first_answer,
            "bound_seconds": self.bound_seconds,
            "models": models,
        }

    def show(self, console: Console) -> None:
        """Prints the report."""
        print_verdict(self.verdict, console)
        facts = self.facts
        console.print(f"{facts.solved:,} of {facts.tasks:,} tasks solved, {facts.failed:,} failed")
        if self.seconds is not None and self.bound_seconds:
            times = f"{self.seconds:,.1f} s, ideal {self.bound_seconds:,.1f} s"
            console.print(f"from the first task to the last answer: {times}")
        if self.seconds_to_first_answer is not None:
            console.print(f"from the command to the first answer: {self.seconds_to_first_answer:,.1f} s")


def task_facts(connection: Connection, id_prefix: str) -> TaskFacts:
    """Tasks whose external id begins with `id_prefix`."""
    (row,) = rows(connection, _TASKS, (id_prefix,))
    return TaskFacts(**row)


def make_report(
    connection: Connection, id_prefix: str, arrival_log: Path, started: float, since: float
) -> DemoReport:
    """Judges the demo started at `started` (Unix epoch) by the arrivals since `since` (monotonic).

    Use is measured from the first send to the send with which all tasks could have been sent: until then
    there certainly was a backlog. The start-up shows in the seconds, which count from the first task.
    """
    facts = task_facts(connection, id_prefix)
    to_monotonic = time.monotonic() - time.time()
    changes = [
        TargetChange(row["at"] + to_monotonic, row["model"], TrafficTarget.parse(row["target"]))
        for row in rows(connection, _TARGETS)
    ]
    arrivals = [arrival for arrival in read_arrivals(arrival_log) if arrival.at >= since]
    if facts.began is None or facts.first_answer is None or facts.last_answer is None:
        return DemoReport(
            facts, None, None, None, judge(arrivals, changes, backlog_from=None, backlog_until=None)
        )
    began = facts.began + to_monotonic
    sent = sorted(arrival.at for arrival in arrivals)
    calls = facts.tasks + int(rows(connection, _ASKED_AGAIN, (id_prefix,))[0]["calls"])
    return DemoReport(
        facts,
        seconds=facts.last_answer - facts.began,
        seconds_to_first_answer=facts.first_answer - started,
        bound_seconds=_bound_seconds(changes, arrivals, calls, began),
        verdict=judge(arrivals, changes, backlog_from=sent[0], backlog_until=sent[: facts.tasks][-1]),
    )


def _bound_seconds(
    changes: Sequence[TargetChange], arrivals: Sequence[Arrival], calls: int, began: float
) -> float:
    """End of the backlog with ideal limiters and each model's real latencies and tokens."""
    by_model: dict[str, list[Arrival]] = defaultdict(list)
    for arrival in sorted(arrivals, key=lambda arrival: arrival.at):
        by_model[arrival.model].append(arrival)
    latency_of = _latencies(by_model)
    everything = list(itertools.chain.from_iterable(by_model.values()))

    def tokens_of(model: str, number: int) -> tuple[int, int]:
        drawn = by_model.get(model) or everything
        arrival = drawn[number % len(drawn)]
        used = arrival.tokens_reserved if arrival.tokens_used is None else arrival.tokens_used
        return arrival.tokens_reserved, used

    return bound(changes, calls, latency_of, began, tokens_of=tokens_of).seconds


def _latencies(by_model: dict[str, list[Arrival]]) -> Callable[[str, int], float]:
    drawn = {
        model: [arrival.ended_at - arrival.at for arrival in arrivals if arrival.ended_at is not None]
        for model, arrivals in by_model.items()
    }
    # A model without calls gets the latencies of the others.
    usual = statistics.median(itertools.chain.from_iterable(drawn.values()))
    endless: defaultdict[str, Iterator[float]] = defaultdict(
        lambda: itertools.repeat(usual),
        {model: itertools.cycle(latencies) for model, latencies in drawn.items() if latencies},
    )
    return lambda model, _task: next(endless[model])
