"""Results of bench/answering.py: the figures of a scene, its failed checks, and the table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table

MAX_OVER_SECONDS = 0.1
COLUMNS = (
    *("scene", "answered", "p50", "p99", "possible p99", "over, p99", "machine", "by", "late", "cost"),
    *("hedge", "left over"),
)


@dataclass(frozen=True, slots=True)
class SceneResult:
    """Figures of one scene. Times are in seconds, costs in USD; `over_p99` is beyond the possible time."""

    scene: str
    asks: int
    answered: int
    p50: float
    p99: float
    possible_p99: float
    over_p99: float
    machine_late_p99: float  # wake-up delay of an idle program meanwhile
    by: dict[str, int]
    provisional: int
    upgraded: int
    cost: float
    preferred_alone: float  # the preferred model's share of the cost
    tasks: dict[str, int]
    open_calls: int
    not_replaced: int  # tasks with an answer of a chosen model in the log, but not in the task
    holders: int
    asyncio_tasks: int
    connections_busy: int

    @property
    def faults(self) -> list[str]:
        """The checks that failed."""
        checks = {
            "not every prompt was answered": self.answered != self.asks,
            f"p99 is {self.over_p99 * 1000:.0f} ms over the possible time": self.over_p99 > MAX_OVER_SECONDS,
            "calls are open in the log": self.open_calls,
            "concurrency slots are held in the limiter": self.holders,
            "asyncio tasks are left over": self.asyncio_tasks,
            "connections are in use": self.connections_busy,
            "tasks are still in the queue": self.tasks.get("unsolved", 0),
            "late answers did not replace provisional ones": self.not_replaced,
        }
        return [fault for fault, failed in checks.items() if failed]


def p99(values: Sequence[float]) -> float:
    """Returns the 99th percentile."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))]


def table(results: Sequence[SceneResult]) -> Table:
    """Returns the scenes as a table; `late` is replaced answers of provisional answers."""
    shown = Table(box=None, pad_edge=False)
    for name in COLUMNS:
        shown.add_column(name, justify="left" if name in ("scene", "by") else "right")
    for one in results:
        by = ", ".join(f"{model} {count}" for model, count in sorted(one.by.items(), key=lambda x: -x[1]))
        hedge = (one.cost - one.preferred_alone) / one.cost if one.cost else 0.0
        left = one.open_calls + one.holders + one.asyncio_tasks + one.connections_busy
        shown.add_row(
            one.scene, f"{one.answered}/{one.asks}", f"{one.p50:.3f} s", f"{one.p99:.3f} s",
            f"{one.possible_p99:.3f} s", f"{one.over_p99 * 1000:.0f} ms",
            f"{one.machine_late_p99 * 1000:.0f} ms", by,
            f"{one.upgraded}/{one.provisional}", f"${one.cost:.4f}", f"{hedge:.0%}", str(left),
        )  # fmt: skip
    return shown
