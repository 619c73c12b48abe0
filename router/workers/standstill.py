"""Reports to Postgres why this process does not send, so that status and console show it."""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import asyncpg

from router.database import fetch, postgres_text
from router.errors import LimiterError, LimiterUnavailable, RouterError, first_line
from router.status import START, Reason, redis_reason

REFRESH_SECONDS = 2.5  # readers ignore reports that are not repeated for 8 s
MAX_DETAIL_CHARACTERS = 300
MAX_REPORTS = 1_000
_PASSWORD = re.compile(r"(?<=://)\S*@")  # up to the last @: a password may contain one


@dataclass(slots=True)
class _Report:
    since: float
    detail: str
    certain_until: float


class StandstillReports:
    """Reasons for not sending that only this process knows. `record` and `clear` cost no I/O."""

    def __init__(self, pool: asyncpg.Pool, worker: str) -> None:
        self._pool = pool
        self._worker = worker
        self._reports: dict[tuple[str, Reason], _Report] = {}
        self._starts: dict[tuple[str, Reason], float] = {}
        self._loops: Counter[str] = Counter()
        self._changed = False
        self._written_at = 0.0

    def record(
        self,
        reason: Reason,
        detail: str | BaseException = "",
        model: str = "",
        *,
        certain_seconds: float = 0.0,
    ) -> None:
        """Adds a reason, of all models by default, or renews its detail; it holds until it is cleared.

        It is not `doubtful` for `certain_seconds`.
        """
        shown, now = without_secrets(detail), time.monotonic()
        known = self._reports.get((model, reason))
        if known is not None:
            known.detail, known.certain_until = shown, now + certain_seconds
        elif len(self._reports) < MAX_REPORTS:
            self._reports[model, reason] = _Report(now, shown, now + certain_seconds)
            self._changed = True

    def clear(self, reason: Reason, model: str = "") -> None:
        """Removes a reason that no longer holds."""
        if self._reports.pop((model, reason), None) is not None:
            self._changed = True

    def loop_began(self, model: str) -> None:
        """Notes that a pull loop of the model runs in this process."""
        self._loops[model] += 1

    def loop_ended(self, model: str) -> None:
        """Notes the end of a pull loop; without another one all reasons of the model are removed."""
        self._loops[model] -= 1
        if not self._loops[model]:
            for key in [key for key in self._reports if key[0] == model]:
                self.clear(key[1], model)

    def has_loop(self, model: str) -> bool:
        """Whether a pull loop of the model runs in this process."""
        return self._loops[model] > 0

    def set_starts(self, starts: Mapping[tuple[str, Reason], float]) -> None:
        """Replaces the starts (monotonic times) of reasons that readers find themselves."""
        if starts != self._starts:
            self._starts = dict(starts)
            self._changed = True

    def holds(self, reason: Reason, model: str = "") -> bool:
        """Whether the reason is recorded."""
        return (model, reason) in self._reports

    def models(self, reason: Reason) -> list[str]:
        """Returns the models for which the reason is recorded."""
        return [model for model, known in self._reports if known is reason]

    def doubtful(self, reason: Reason) -> list[str]:
        """Returns the models for which the reason was not recorded again of late."""
        now = time.monotonic()
        return [
            model
            for (model, known), report in self._reports.items()
            if known is reason and report.certain_until <= now
        ]

    async def step(self) -> None:
        """Writes the reasons if they changed, and repeats them while there are any. Raises DatabaseError."""
        due = bool(self._reports or self._starts) and time.monotonic() - self._written_at >= REFRESH_SECONDS
        if self._changed or due:
            await self._write()

    async def withdraw(self) -> None:
        """Removes all reasons, when the process ends."""
        self._reports.clear()
        self._starts.clear()
        await self._write()

    async def _write(self) -> None:
        self._changed = False
        now = time.monotonic()
        reports = [
            {"model": model, "code": reason.value, "detail": report.detail, "age_seconds": now - report.since}
            for (model, reason), report in self._reports.items()
        ] + [
            {"model": model, "code": START + reason.value, "detail": "", "age_seconds": now - since}
            for (model, reason), since in self._starts.items()
        ]
        try:
            statement = "SELECT replace_worker_reports($1, $2)"
            await fetch(self._pool, statement, self._worker, json.dumps(reports))
        except BaseException:
            self._changed = True
            raise
        self._written_at = now


def reason_of(error: RouterError) -> Reason | None:
    """Returns the reason that an error of a pull loop means; None for a permit that came too late."""
    if isinstance(error, LimiterUnavailable):
        return redis_reason(str(error))
    return None if isinstance(error, LimiterError) else Reason.CLAIMS_FAILING


def without_secrets(detail: str | BaseException) -> str:
    """Returns the first line of an error, shortened, without the user and password of a URL."""
    line = postgres_text(first_line(detail))
    return _PASSWORD.sub("***@", line)[:MAX_DETAIL_CHARACTERS]
