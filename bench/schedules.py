"""Computes schedules of given calls: the ideal one, and the old flow with and without each of its waits.

The old flow: a run splits the unsolved tasks into equal partitions, one per worker; a worker sends ten
concurrently, waits for the slowest, writes, takes the next ten, and stops at its time limit; when all workers
have ended, the next run follows after a gap. Each wait can be removed alone, to measure its cost on the same
latencies.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

MOST_RUNS = 10_000

Admit = Callable[[float], bool]


@dataclass(frozen=True, slots=True)
class OldShape:
    """Parameters of the old flow. Times in seconds.

    waits_for_batch: a worker takes the next ten when the slowest of the last ten has ended; else each of its
    slots takes the next task by itself. own_parts: each worker has its partition; else all share one list.
    killed_at_limit: calls in flight at the limit are lost and repeated; else a batch may end.
    """

    workers: int = 20
    batch: int = 10
    limit_seconds: float = 1800.0
    gap_seconds: float = 2.0
    waits_for_batch: bool = True
    own_parts: bool = True
    killed_at_limit: bool = False

    @property
    def at_once(self) -> int:
        """Maximum concurrency."""
        return self.workers * self.batch


@dataclass(slots=True)
class OldRun:
    """Result of the old flow; `seconds` is the time of the last answer.

    Slot time (`seconds` x concurrency) divides into `working` (calls whose answers counted), `for_batch`
    (waiting for the slowest of ten, and lost calls), `for_workers` (waiting for the slowest worker of a run)
    and `for_restart` (between runs), all in slot-seconds. `sent` counts calls, refused ones included.
    """

    seconds: float = 0.0
    runs: int = 0
    sent: int = 0
    refused: int = 0
    working: float = 0.0
    for_batch: float = 0.0
    for_workers: float = 0.0
    for_restart: float = 0.0


def ideal_seconds(latencies: Sequence[float], slots: int) -> float:
    """Time of the last answer if `slots` slots take the calls in order, each as soon as it is free."""
    free = [0.0] * min(slots, max(1, len(latencies)))
    for latency in latencies:
        heapq.heapreplace(free, free[0] + latency)
    return max(free)


def cut(tasks: Sequence[int], parts: int) -> list[list[int]]:
    """Splits the tasks into `parts` partitions of equal size, or one more in the first ones."""
    size, more = divmod(len(tasks), parts)
    ends = list(itertools.accumulate([size + (part < more) for part in range(parts)], initial=0))
    return [list(tasks[low:high]) for low, high in itertools.pairwise(ends)]


def simulate_old(latencies: Sequence[float], shape: OldShape, admit: Admit | None = None) -> OldRun:
    """Simulates the old flow on these latencies (seconds): all tasks present at 0, writes take no time.

    `admit(at)` is the provider's quota: a refused call returns at once and waits for the next run.
    """
    total = OldRun()
    unsolved: list[int] = list(range(len(latencies)))
    start = 0.0
    while unsolved:
        if total.runs == MOST_RUNS:
            raise RuntimeError(f"{MOST_RUNS} runs have not solved all tasks: {len(unsolved)} are left.")
        if total.runs:
            start = total.seconds + shape.gap_seconds
            total.for_restart += shape.gap_seconds * shape.at_once
        total.runs += 1
        unsolved = _Run(latencies, shape, admit, start, total).work_through(unsolved)
    return total


class _Run:
    """One run of the DAG. A *unit* sends together and waits together: a worker, or one of its slots."""

    def __init__(
        self, latencies: Sequence[float], shape: OldShape, admit: Admit | None, start: float, total: OldRun
    ) -> None:
        self._latencies = latencies
        self._shape = shape
        self._admit = admit
        self._start = start
        self._total = total
        self._left: list[int] = []

    def work_through(self, tasks: list[int]) -> list[int]:
        """Solves as many tasks as fit into this run; returns the others in order."""
        shape = self._shape
        lists = [deque(part) for part in cut(tasks, shape.workers if shape.own_parts else 1)]
        a_worker = 1 if shape.waits_for_batch else shape.batch
        units = [lists[worker % len(lists)] for worker in range(shape.workers) for _ in range(a_worker)]
        free = [(self._start, unit) for unit in range(len(units))]
        ends: list[float] = []
        end_of_limit = self._start + shape.limit_seconds
        while free:
            now, unit = heapq.heappop(free)
            if units[unit] and now < end_of_limit:
                heapq.heappush(free, (self._send(units[unit], now, end_of_limit), unit))
            else:
                ends.append(now)
        over = max(ends)
        width = shape.at_once // len(units)
        self._total.for_workers += sum(over - end for end in ends) * width
        self._total.seconds = over
        return sorted([*self._left, *itertools.chain.from_iterable(lists)])

    def _send(self, tasks: deque[int], now: float, end_of_limit: float) -> float:
        """Sends the next tasks together; returns the time at which the unit is free again."""
        shape, total = self._shape, self._total
        width = shape.batch if shape.waits_for_batch else 1
        going = [tasks.popleft() for _ in range(min(width, len(tasks)))]
        total.sent += len(going)
        kept = [task for task in going if self._admit is None or self._admit(now)]
        refused = set(going) - set(kept)
        total.refused += len(refused)
        self._left.extend(refused)
        took = max((self._latencies[task] for task in kept), default=0.0)
        if shape.killed_at_limit and now + took > end_of_limit:
            took = end_of_limit - now
            self._left.extend(kept)
            kept = []
        work = sum(self._latencies[task] for task in kept)
        total.working += work
        total.for_batch += took * width - work
        return now + took
