"""Puts what the operator wrote into force: the lines of the `traffic.<model>` Variables, and the DAG's pause.

Several readers may watch the same Variables; each passes the time of its read by the metadata database's
clock, and the older read loses, in Redis and in Postgres alike.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable, Mapping

import asyncpg

from router.database import fetch, postgres_text
from router.errors import InputError, LimiterError, TrafficTargetError
from router.limiter import TrafficLimiter
from router.models.airflow_api import VARIABLE_PREFIX
from router.models.roster import Roster
from router.traffic import TrafficTarget

log = logging.getLogger("router.traffic")

LONGEST_NAME = 100
TELL_WATCHING_SECONDS = 2.5
REASSERT_SECONDS = 5.0  # a Redis that lost its memory hears the target again
STEP_SECONDS = 1.0  # the longest that a step waits for Redis: the next one reads the pause again


class TargetSync:
    """Applies what was read; remembers what is in force, so that reading the same again costs nothing."""

    def __init__(self, pool: asyncpg.Pool, limiter: TrafficLimiter) -> None:
        self._pool = pool
        self._limiter = limiter
        self._lines: dict[str, str] = {}
        self._told_at: dict[str, float] = {}
        self._good: dict[str, tuple[TrafficTarget, int]] = {}
        self._held: bool | None = None
        self._there: frozenset[str] | None = None
        self._well = True
        self._watching_told_at = -TELL_WATCHING_SECONDS
        self.troubles: dict[str, str] = {}

    async def apply_last_good(self) -> None:
        """Put in force what was in force last, before any Variable was read."""
        for model, (target, version) in (await read_targets(self._pool)).items():
            self._good[model] = (target, version)
            await self._tell(model)

    async def begin(self, roster: Roster) -> None:
        """Put in force what was in force last; for a model that never had a target, its default."""
        await self.apply_last_good()
        defaults: dict[str, str | None] = {
            name: model.default_target for name, model in roster.models.items() if name not in self._good
        }
        await self.apply(defaults, version=1)  # any Variable that was ever read is newer

    async def step(self, lines: Mapping[str, str | None], *, paused: bool | None, version: int) -> None:
        """Put what was read in force: the pause (None if unknown), which needs no Redis, then all lines."""
        if paused is not None:
            await self.apply_pause(held=paused, version=version)
        await self.report_watching()
        try:
            await asyncio.wait_for(self.apply(lines, version=version), STEP_SECONDS)
        except (LimiterError, asyncio.TimeoutError) as error:
            if self._well:
                log.warning("targets cannot be put in force: %s; trying again", type(error).__name__)
            self._well = False
        else:
            self._well = True
            await self.clear_errors(lines)

    async def apply(self, lines: Mapping[str, str | None], *, version: int) -> None:
        """Put `lines` (model -> the Variable's text, None if it is gone: then the last stays) into force.

        A line that does not parse changes nothing and is reported, in Postgres and in the log; a Variable
        whose name is no model's is left alone, so that it keeps no other from being read. A limit that can
        never bind is logged. `version`: microseconds of the read.
        """
        for model, line in lines.items():
            if line is not None and line != self._lines.get(model):
                await self._take(model, line, version)
            elif model in self._good and time.monotonic() - self._told_at.get(model, 0.0) > REASSERT_SECONDS:
                await self._tell(model)

    async def clear_errors(self, lines: Mapping[str, str | None]) -> None:
        """A Variable that is gone is wrong no more; `lines` are all that there are."""
        there = frozenset(model for model, line in lines.items() if line is not None)
        if there != self._there:
            await clear_target_errors(self._pool, there)
            self._there = there

    async def apply_pause(self, *, held: bool, version: int) -> None:
        """Hold the batch back (the DAG is paused), or let it go."""
        if held != self._held:
            await set_paused(self._pool, held=held, version=version)
            self._held = held

    async def report_watching(self) -> None:
        """Say every few seconds that somebody watches, so that workers need not."""
        if time.monotonic() - self._watching_told_at > TELL_WATCHING_SECONDS:
            await report_watching(self._pool)
            self._watching_told_at = time.monotonic()

    async def _take(self, model: str, line: str, version: int) -> None:
        try:
            target = TrafficTarget.parse(line)
            in_force = await self._put_in_force(model, target, version)
        except TrafficTargetError as error:
            await record_target_error(self._pool, model, postgres_text(line), str(error))
            self._refused(model, line, error)
            return
        except InputError as error:
            self._refused(model, line, error)
            return
        await record_target(self._pool, model, str(target), version)
        self.troubles.pop(model, None)
        if not in_force:
            return  # somebody read later, by the clock: the next read tries again
        self._lines[model] = line  # last, so that a failure on the way is tried again
        for warning in target.warnings:
            log.warning("%s%s: %s", VARIABLE_PREFIX, model, warning)

    def _refused(self, model: str, line: str, error: Exception) -> None:
        self._lines[model] = line
        self.troubles[model] = str(error)
        log.warning("%s%s: %s", VARIABLE_PREFIX, _shown(model), str(error).splitlines()[0])

    async def _tell(self, model: str) -> None:
        await self._put_in_force(model, *self._good[model])  # what is newer stays

    async def _put_in_force(self, model: str, target: TrafficTarget, version: int) -> bool:
        """False if what is in force is newer."""
        self._told_at[model] = time.monotonic()
        in_force = await self._limiter.set_target(model, target, version=version)
        if in_force:
            self._good[model] = (target, version)
        return in_force


def _shown(name: str) -> str:
    """A name as it can stand in one line of a log."""
    return name if name.isprintable() and len(name) <= LONGEST_NAME else repr(name[:LONGEST_NAME])


async def read_targets(pool: asyncpg.Pool) -> dict[str, tuple[TrafficTarget, int]]:
    """model -> (target, version): the last good targets, which outlive Redis, Airflow and this process."""
    found = await fetch(pool, "SELECT model, target, version FROM newest_targets")
    return {row["model"]: (TrafficTarget.parse(row["target"]), row["version"]) for row in found}


async def record_target(pool: asyncpg.Pool, model: str, target: str, version: int) -> None:
    """Keep a target that is in force now, for a restart and for the judge."""
    await fetch(pool, "SELECT record_target($1, $2, $3)", model, target, version)


async def record_target_error(pool: asyncpg.Pool, model: str, line: str, problem: str) -> None:
    """Say that a model's Variable does not parse; its last good target stays in force."""
    await fetch(pool, "SELECT record_target_error($1, $2, $3)", model, line, problem)


async def clear_target_errors(pool: asyncpg.Pool, models: Iterable[str]) -> None:
    """Only the lines of these models can be wrong: the Variables of others are gone."""
    await fetch(pool, "SELECT clear_target_errors($1)", list(models))


async def set_paused(pool: asyncpg.Pool, *, held: bool, version: int) -> None:
    """Hold the batch back, or let it go; the older read loses."""
    await fetch(pool, "SELECT set_paused($1, $2)", held, version)


async def report_watching(pool: asyncpg.Pool) -> None:
    """Say that the Variables are watched, so that workers need not read them."""
    await fetch(pool, "SELECT watcher_heartbeat()")
