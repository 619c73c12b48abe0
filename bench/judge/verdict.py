"""Judges whether any rolling window at the backend exceeded its limit, and how much of it was used.

The judge relies only on the backend's own arrival log and the history of targets. Its rule:

**A send is valid if, counted with it, every limit of the active target holds**: at most N requests and N
tokens arrived within the half-open window (t-W, t], and at most N calls were in flight at t. Checked at each
arrival, this covers every window [t, t+W): a count only grows where something arrives. A lowered target
therefore does not invalidate earlier sends; it forbids the next one until the window has room.

- *Active target*: a change takes time to reach the limiter, so an arrival within `settle_seconds` after it
  may obey either target, but one of them as a whole, since a limiter decides by one target at a time. A
  model without a target, or stopped, may be sent nothing.
- *Tokens and money*: a call counts with its reservation until it has ended and with its use afterwards, as
  the limiter corrects it; with `tokens="reserved"` always with its reservation. A calendar period has the
  calls that arrive in it, by UTC.
- *Concurrency*: a call occupies its slot in [at, ended_at): another may start at the time it ends.
- Refused calls (429, ...) count like others: they were sent.
- *Worst window ratio*: the greatest count / N; above 1 is a breach. A send while stopped counts as 2.
- *Use*: sends during the backlog / sends of an ideal limiter (`bench/judge/ideal.py`).

    python -m bench.judge ARRIVALS.jsonl TARGETS.jsonl [--json]      exit code 1 if there is a breach
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.table import Table

from bench.judge.arrivals import (
    NANOSECONDS,
    NEVER,
    Arrival,
    Integers,
    ModelLog,
    TargetChange,
    model_log,
    nanoseconds,
)
from bench.judge.ideal import replay_ideal
from bench.judge.windows import AGAINST_A_STOP, Counts
from router.traffic import TrafficTarget

MOST_LISTED = 1000
TokenRule = Literal["corrected", "reserved"]


@dataclass(frozen=True)
class Breach:
    """One send too many: it made the count `count` where `limit` allows `allowed`."""

    model: str
    request_id: str
    at: float
    limit: str
    count: int
    allowed: int


@dataclass(frozen=True)
class ModelVerdict:
    """Verdict on one model. `breaches` lists the first thousand, `breach_count` counts all.

    `use` is None without a backlog, and 1 if the ideal could send nothing. At most four times the real sends
    are replayed, so that a `use` below a quarter is an upper bound.
    """

    target: str
    sent: int
    worst_window_ratio: float
    use: float | None
    sent_in_backlog: int
    ideal_sends: int
    breach_count: int
    breaches: list[Breach]


@dataclass(frozen=True)
class Verdict:
    """Verdicts by model."""

    models: dict[str, ModelVerdict]

    @property
    def breach_count(self) -> int:
        return sum(model.breach_count for model in self.models.values())

    def as_json(self) -> dict[str, Any]:
        """Plain values, `{breach_count, models: {name: {target, sent, worst_window_ratio, use, ...}}}`."""
        models = {name: asdict(model) for name, model in self.models.items()}
        return {"breach_count": self.breach_count, "models": models}


def judge(
    arrivals: Iterable[Arrival],
    changes: Sequence[TargetChange],
    *,
    backlog_from: float | None,
    backlog_until: float | None,
    settle_seconds: float = 1.0,
    tokens: TokenRule = "corrected",
    utc_offset_seconds: float = 0.0,
) -> Verdict:
    """Judges every arrival of every model and measures the use in [backlog_from, backlog_until].

    Without both ends no use is measured. UTC, in seconds since 1970, is the log's time plus
    `utc_offset_seconds`: only calendar periods need it. O(n log n) in the arrivals; a million take some
    seconds.
    """
    by_model: dict[str, list[Arrival]] = defaultdict(list)
    for arrival in arrivals:
        by_model[arrival.model].append(arrival)
    backlog = None if backlog_from is None or backlog_until is None else (backlog_from, backlog_until)
    terms = _Terms(backlog, nanoseconds(settle_seconds), tokens, nanoseconds(utc_offset_seconds))
    verdicts = {}
    for model in sorted({*by_model, *(change.model for change in changes)}):
        history = sorted((row for row in changes if row.model == model), key=lambda row: row.at_seconds)
        log = model_log(by_model[model])
        verdicts[model] = _judge_model(model, log, history, terms)
    return Verdict(verdicts)


@dataclass(frozen=True)
class _Terms:
    backlog: tuple[float, float] | None
    settle: int
    tokens: TokenRule
    utc_offset: int


def _judge_model(model: str, log: ModelLog, history: list[TargetChange], terms: _Terms) -> ModelVerdict:
    if terms.tokens == "reserved":
        log = log._replace(used=log.reserved, spent=log.cost)
    counts = Counts(log, terms.utc_offset)
    periods = list(_periods(log, history, terms.settle))
    ratios = np.full(len(log.at), np.inf)
    for part, target in periods:
        ratios[part] = np.minimum(ratios[part], counts.ratio(target, part))
    ratios[np.isinf(ratios)] = AGAINST_A_STOP
    wrong = np.flatnonzero(ratios > 1)
    use, sent, ideal = _use(log, history, terms)
    return ModelVerdict(
        target=str(history[-1].target) if history else "none",
        sent=len(log.at),
        worst_window_ratio=float(ratios.max(initial=0.0)),
        use=use,
        sent_in_backlog=sent,
        ideal_sends=ideal,
        breach_count=len(wrong),
        breaches=[_breach(model, int(i), log, counts, periods) for i in wrong[:MOST_LISTED]],
    )


def _periods(
    log: ModelLog, history: list[TargetChange], settle: int
) -> Iterator[tuple[slice, TrafficTarget]]:
    """Each target with the arrivals that may obey it, until `settle` after the next change."""
    starts = [nanoseconds(change.at_seconds) for change in history]
    ends = [start + settle for start in starts[1:]] + [NEVER]
    for change, start, end in zip(history, starts, ends, strict=False):
        first, last = np.searchsorted(log.at, [start, end], side="left")
        if first < last:
            yield slice(int(first), int(last)), change.target


def _breach(
    model: str, index: int, log: ModelLog, counts: Counts, periods: list[tuple[slice, TrafficTarget]]
) -> Breach:
    """The breach by the target that the arrival comes closest to obeying."""
    nearest: tuple[str, int, int] = ("no target yet", 1, 0)
    nearest_ratio = np.inf
    for part, target in periods:
        if part.start <= index < part.stop:
            ratio, worst = _worst_limit(target, index, counts)
            if ratio < nearest_ratio:
                nearest_ratio, nearest = ratio, worst
    return Breach(model, log.request_ids[index], int(log.at[index]) / NANOSECONDS, *nearest)


def _worst_limit(target: TrafficTarget, index: int, counts: Counts) -> tuple[float, tuple[str, int, int]]:
    if target.stopped:
        return AGAINST_A_STOP, ("stopped", 1, 0)
    met = [(limit, int(all_met[index]), allowed) for limit, allowed, all_met in counts.limits(target)]
    worst = max(met, key=lambda limit: limit[1] / limit[2])
    return worst[1] / worst[2], worst


def _use(log: ModelLog, history: list[TargetChange], terms: _Terms) -> tuple[float | None, int, int]:
    if terms.backlog is None:
        return None, 0, 0
    start, end = nanoseconds(terms.backlog[0]), nanoseconds(terms.backlog[1])
    first = int(np.searchsorted(log.at, start, side="left"))
    last = int(np.searchsorted(log.at, end, side="right"))
    sent = last - first
    ends = np.where(log.ended == NEVER, np.maximum(end, log.at), log.ended)
    ideal = replay_ideal(
        history,
        ((ends - log.at) / NANOSECONDS)[first:last],
        *terms.backlog,
        amounts=list(zip(*(column[first:last].tolist() for column in _amounts(log)), strict=True)),
        before=_still_felt(log, first, start, history),
        most=4 * sent + 1000,
        utc_offset=terms.utc_offset,
    )
    return (sent / len(ideal) if len(ideal) else 1.0), sent, len(ideal)


def _still_felt(log: ModelLog, first: int, start: int, history: list[TargetChange]) -> ModelLog:
    """Calls before the backlog that still count in a window or occupy a slot when it begins."""
    longest = max((change.target.longest_window_seconds for change in history), default=0) * NANOSECONDS
    felt = np.flatnonzero((log.at[:first] > start - longest) | (log.ended[:first] > start))
    return ModelLog(
        log.at[felt], log.ended[felt], log.reserved[felt], log.used[felt], log.cost[felt], log.spent[felt], []
    )


def _amounts(log: ModelLog) -> tuple[Integers, Integers, Integers, Integers]:
    return log.reserved, log.used, log.cost, log.spent


def print_verdict(verdict: Verdict, console: Console | None = None) -> None:
    """Prints one line per model and the first breaches of each."""
    table = Table(title="Arrivals at the backend")
    table.add_column("model")
    table.add_column("target")
    for heading in ("sent", "worst window / N", "use", "breaches"):
        table.add_column(heading, justify="right")
    for name, model in verdict.models.items():
        style = "red" if model.breach_count else None
        use = "-" if model.use is None else f"{model.use:.2%}"
        ratio = f"{model.worst_window_ratio:.4f}"
        table.add_row(
            name, model.target, f"{model.sent:,}", ratio, use, f"{model.breach_count:,}", style=style
        )
    console = console or Console()
    console.print(table)
    for name, model in verdict.models.items():
        for breach in model.breaches[:5]:
            console.print(
                f"{name}: {breach.count:,} where {breach.limit} allows {breach.allowed:,}, "
                f"at {breach.at:.6f} with request {breach.request_id or '(no id)'}",
                markup=False,
            )
