"""What bench/answering.py has seen: a scene's figures, what is wrong with them, and the table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table

MOST_OVER_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class Seen:
    """What one scene came to. Times in seconds, cost in USD; `over_p99` is beyond what was possible."""

    scene: str
    asks: int
    answered: int
    p50: float
    p99: float
    possible_p99: float
    over_p99: float
    machine_late_p99: float  # how late a program wakes that does nothing but sleep, meanwhile
    by: dict[str, int]
    provisional: int
    upgraded: int
    cost: float
    preferred_alone: float  # the part of the cost that is the first model's
    tasks: dict[str, int]
    open_calls: int
    not_replaced: int  # tasks that a chosen model answered, and that do not hold its answer
    holders: int
    asyncio_tasks: int
    connections_busy: int

    @property
    def faults(self) -> list[str]:
        """What is not as it must be."""
        wrong = {
            "not every prompt was answered": self.answered != self.asks,
            f"p99 is {self.over_p99 * 1000:.0f} ms over what was possible": self.over_p99 > MOST_OVER_SECONDS,
            "calls are open in the log": self.open_calls,
            "places are held in the limiter": self.holders,
            "asyncio tasks are left over": self.asyncio_tasks,
            "connections are in use": self.connections_busy,
            "tasks are still in the queue": self.tasks.get("unsolved", 0),
            "late answers did not replace": self.not_replaced,
        }
        return [fault for fault, is_so in wrong.items() if is_so]


def p99(values: Sequence[float]) -> float:
    """The value that one in a hundred exceeds."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))]


def table(seen: Sequence[Seen]) -> Table:
    """The scenes side by side; `late` is answers replaced of answers that were provisional."""
    shown = Table(box=None, pad_edge=False)
    for name in (
        "scene",
        "answered",
        "p50",
        "p99",
        "possible p99",
        "over, p99",
        "machine",
        "by",
        "late",
        "cost",
        "hedge",
        "left over",
    ):
        shown.add_column(name, justify="left" if name in ("scene", "by") else "right")
    for one in seen:
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
