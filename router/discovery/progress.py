"""Progress of a search, for terminals, logs and the console: per trial the calls so far, then the verdict.

The search changes it, and calls back for each line. All sizes are bounded by the trials, not by the catalogs.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import asyncpg

from router.background import cancel_and_wait
from router.database import fetch
from router.errors import DatabaseError

FIRST_SUMMARY_SECONDS = 5.0
LAST_SUMMARY_SECONDS = 60.0
STORE_SECONDS = 1.0

Role = Literal["incumbent", "candidate"]


@dataclass(slots=True)
class TrialProgress:
    """Calls of one model for the prompts of one category. `verdict` is None until the search has decided."""

    category: str
    model: str
    role: Role
    of: int
    calls: int = 0
    answered: int = 0
    judged: int = 0  # pairs of answers
    stopped: bool = False  # early: further calls would not change the verdict
    verdict: str | None = None
    reason: str | None = None

    @property
    def is_over(self) -> bool:
        """Whether all of its calls were made."""
        return self.stopped or self.calls >= self.of

    @property
    def state(self) -> str:
        """The calls so far, as text."""
        failed = self.calls - self.answered
        return f"{self.calls}/{self.of}" + (f" ({failed} failed)" if failed else "")


@dataclass(slots=True)
class SearchProgress:
    """What a search does now.

    `log` gets one line for each event and, if `has_summaries`, the verdicts and a summary of the trials every
    few seconds, at first every 5 s and later every minute. It must return quickly.
    """

    log: Callable[[str], None] = lambda _line: None
    has_summaries: bool = True
    search: int | None = None
    stage: str = "reading catalogs"
    trials: dict[tuple[str, str], TrialProgress] = field(default_factory=dict)
    _began: float = field(default_factory=time.monotonic)
    _summary_at: float = field(default_factory=lambda: time.monotonic() + FIRST_SUMMARY_SECONDS)

    @property
    def seconds(self) -> float:
        """Seconds since the start of the search."""
        return time.monotonic() - self._began

    def enter(self, stage: str) -> None:
        """Begins a stage."""
        self.stage = stage
        self.log(stage)

    def expect(self, category: str, model: str, role: Role, calls: int) -> None:
        """Announces a trial."""
        self.trials[category, model] = TrialProgress(category, model, role, calls)

    def called(self, category: str, model: str, *, answered: bool) -> None:
        """Counts an ended call of a trial."""
        trial = self.trials[category, model]
        trial.calls += 1
        trial.answered += answered
        self._tick()

    def stop(self, category: str, model: str) -> None:
        """Marks a trial that was ended early."""
        self.trials[category, model].stopped = True

    def judged(self, category: str, model: str) -> None:
        """Counts a judged pair of answers."""
        self.trials[category, model].judged += 1
        self._tick()

    def decided(self, category: str, model: str, verdict: str, reason: str) -> None:
        """Records the verdict on a candidate."""
        trial = self.trials.get((category, model))
        if trial is not None:
            trial.verdict, trial.reason = verdict, reason
        if self.has_summaries:
            self.log(f"{category}: {model}: {verdict}: {reason}")

    def as_json(self) -> dict[str, Any]:
        """The progress as it is stored for the console, and for the error of a second search."""
        return {
            "stage": self.stage,
            "calls": sum(trial.calls for trial in self.trials.values()),
            "of": sum(trial.calls if trial.stopped else trial.of for trial in self.trials.values()),
            "trials": [asdict(trial) for trial in self.trials.values()],
        }

    def _tick(self) -> None:
        now = time.monotonic()
        if self.has_summaries and now >= self._summary_at:
            self._summary_at = now + min(max(self.seconds, FIRST_SUMMARY_SECONDS), LAST_SUMMARY_SECONDS)
            for line in self._summary():
                self.log(line)

    def _summary(self) -> list[str]:
        by_category: dict[str, list[str]] = {}
        for trial in self.trials.values():
            judged = f", {trial.judged} judged" if trial.judged else ""
            by_category.setdefault(trial.category, []).append(f"{trial.model} {trial.state}{judged}")
        return [f"{category}: {', '.join(models)}" for category, models in by_category.items()]


@contextlib.asynccontextmanager
async def stored(progress: SearchProgress, pool: asyncpg.Pool) -> AsyncIterator[None]:
    """Stores the progress every second during the block, for other processes."""

    async def store_often() -> None:
        last = None
        while True:
            now = progress.as_json()
            if now != last:
                with contextlib.suppress(DatabaseError):  # the next second stores it
                    statement = "UPDATE searches SET progress = $2::jsonb WHERE search = $1"
                    await fetch(pool, statement, progress.search, json.dumps(now))
                    last = now
            await asyncio.sleep(STORE_SECONDS)

    storing = asyncio.create_task(store_often(), name="router search progress")
    try:
        yield
    finally:
        await cancel_and_wait(storing)
