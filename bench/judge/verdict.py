"""Was any window at the backend's door overfull, and how much of what was allowed was used?

The judge believes only the backend's own arrival log and the history of targets. Its rule:

**A send obeys if, counted with it, every limit of the target then in force holds**: no more than N requests
and N tokens arrived within the half-open window (t-W, t], and no more than N calls were running at t. Checked
at each arrival, this covers every window [t, t+W) at any place: a count only grows where something arrives. A
lowered target therefore does not make earlier sends wrong; it forbids the next one until the window has room.

- *In force*: a change takes time to reach the limiter, so that an arrival within `settle_seconds` after it
  may obey either target - but one of them as a whole, since a limiter decides by one target at a time. A
  model that has no target yet, or is stopped, may be sent nothing.
- *Tokens*: a call counts with its reservation until it has ended, and with what it used after that, as the
  limiter corrects it; with `tokens="reserved"` always with its reservation.
- *At once*: a call holds its place in [at, ended_at): one may begin in the very moment another ends.
- Refused calls (429, ...) count like others: they were sent.
- *Worst window ratio*: the greatest count / N; above 1 is a breach. A send against a stop counts as 2.
- *Use*: sends while there was a backlog / what an ideal limiter could have sent (`bench/judge/ideal.py`).

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
    """One send too many: with it there were `count` where `limit` allowed `allowed`."""

    model: str
    request_id: str
    at: float
    limit: str
    count: int
    allowed: int


@dataclass(frozen=True)
class ModelVerdict:
    """What one model was sent. `breaches` lists the first thousand, `breach_count` counts all.

    `use` is None where no backlog was judged; an ideal that could send nothing makes it 1. Sends are replayed
    up to four times the real ones, so that a `use` below a quarter is an upper bound.
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
    """Each model's verdict, by name."""

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
) -> Verdict:
    """Judge every arrival of every model; measure the use in [backlog_from, backlog_until], ends included.

    Without either end no use is measured. O(n log n) in the arrivals; a million take some seconds.
    """
    by_model: dict[str, list[Arrival]] = defaultdict(list)
    for arrival in arrivals:
        by_model[arrival.model].append(arrival)
    backlog = None if backlog_from is None or backlog_until is None else (backlog_from, backlog_until)
    terms = _Terms(backlog, nanoseconds(settle_seconds), tokens)
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


def _judge_model(model: str, log: ModelLog, history: list[TargetChange], terms: _Terms) -> ModelVerdict:
    counts = Counts(log if terms.tokens == "corrected" else log._replace(used=log.reserved))
    periods = list(_periods(log, history, terms.settle))
    ratios = np.full(len(log.at), np.inf)
    for part, target in periods:
        ratios[part] = np.minimum(ratios[part], counts.ratio(target, part))
    ratios[np.isinf(ratios)] = AGAINST_A_STOP
    wrong = np.flatnonzero(ratios > 1)
    use, sent, ideal = _use(log, history, terms.backlog)
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
    """Each target with the arrivals that may obey it: from its change until `settle` after the next one."""
    starts = [nanoseconds(change.at_seconds) for change in history]
    ends = [start + settle for start in starts[1:]] + [NEVER]
    for change, start, end in zip(history, starts, ends, strict=False):
        first, last = np.searchsorted(log.at, [start, end], side="left")
        if first < last:
            yield slice(int(first), int(last)), change.target


def _breach(
    model: str, index: int, log: ModelLog, counts: Counts, periods: list[tuple[slice, TrafficTarget]]
) -> Breach:
    """The breach as the target sees it that the arrival is nearest to obeying."""
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


def _use(
    log: ModelLog, history: list[TargetChange], backlog: tuple[float, float] | None
) -> tuple[float | None, int, int]:
    if backlog is None:
        return None, 0, 0
    start, end = nanoseconds(backlog[0]), nanoseconds(backlog[1])
    first = int(np.searchsorted(log.at, start, side="left"))
    last = int(np.searchsorted(log.at, end, side="right"))
    sent = last - first
    ends = np.where(log.ended == NEVER, np.maximum(end, log.at), log.ended)
    ideal = replay_ideal(
        history,
        ((ends - log.at) / NANOSECONDS)[first:last],
        *backlog,
        tokens=list(zip(log.reserved[first:last].tolist(), log.used[first:last].tolist(), strict=True)),
        before=_still_felt(log, first, start, history),
        most=4 * sent + 1000,
    )
    return (sent / len(ideal) if len(ideal) else 1.0), sent, len(ideal)


def _still_felt(log: ModelLog, first: int, start: int, history: list[TargetChange]) -> ModelLog:
    """The calls before the backlog that a window or a place at once still remembers when it begins."""
    longest = max((change.target.longest_window_seconds for change in history), default=0) * NANOSECONDS
    felt = np.flatnonzero((log.at[:first] > start - longest) | (log.ended[:first] > start))
    return ModelLog(log.at[felt], log.ended[felt], log.reserved[felt], log.used[felt], [])


def print_verdict(verdict: Verdict, console: Console | None = None) -> None:
    """Print one line a model, and the first breaches of each."""
    table = Table(title="At the backend's door")
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
