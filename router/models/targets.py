"""Applies what operators set in Airflow: targets in the `traffic.<model>` Variables, and the DAG's pause.

Several readers may watch the same Variables. Each passes the time of its read by the metadata database's
clock, and Redis and Postgres ignore the older read.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping

import asyncpg

from router.database import fetch, postgres_text
from router.errors import InputError, LimiterError, TrafficTargetError, first_line, printable
from router.limiter import TrafficLimiter, check_model_name
from router.models.airflow_api import VARIABLE_PREFIX
from router.models.roster import Roster
from router.settings import NO_PRICE
from router.traffic import TrafficTarget

log = logging.getLogger("router.traffic")

MAX_NAME_CHARACTERS = 100
DEFAULT_VERSION = 1  # of a model's default target: the read of any Variable is newer
HEARTBEAT_SECONDS = 2.5
REASSERT_SECONDS = 5.0  # how soon a Redis that lost its state gets the target again
SYNC_SECONDS = 1.0  # maximum wait for Redis, so that the pause is read again in time


class TargetSync:
    """Applies targets to the limiter and records them in Postgres; an unchanged read costs nothing.

    `errors` maps a model to the error of its Variable.
    """

    def __init__(self, pool: asyncpg.Pool, limiter: TrafficLimiter) -> None:
        self._pool = pool
        self._limiter = limiter
        self._lines: dict[str, str] = {}  # the last line of each model that was applied or rejected
        self._active: dict[str, tuple[TrafficTarget, int]] = {}
        self._set_at: dict[str, float] = {}
        self._paused: bool | None = None
        self._variables: frozenset[str] | None = None
        self._failing = False
        self._heartbeat_at = -HEARTBEAT_SECONDS
        self.errors: dict[str, str] = {}

    async def restore(self, roster: Roster) -> None:
        """Applies the targets that were active last; a model that never had one gets its default."""
        for model, (target, version) in (await read_targets(self._pool)).items():
            self._active[model] = (target, version)
            await self._set(model, target, version)
        defaults: dict[str, str | None] = {
            name: model.default_target for name, model in roster.models.items() if name not in self._active
        }
        await self.apply(defaults, version=DEFAULT_VERSION)

    async def sync(self, lines: Mapping[str, str | None], *, paused: bool | None, version: int) -> None:
        """Applies one read: the pause (None if unknown), which does not need Redis, then all lines."""
        if paused is not None and paused != self._paused:
            await fetch(self._pool, "SELECT set_paused($1, $2)", paused, version)
            self._paused = paused
        await self._send_heartbeat()
        try:
            await asyncio.wait_for(self.apply(lines, version=version), SYNC_SECONDS)
        except (LimiterError, asyncio.TimeoutError) as error:
            if not self._failing:
                log.warning("applying targets failed, retrying: %s", type(error).__name__)
            self._failing = True
        else:
            self._failing = False
            await self.clear_errors(lines)

    async def apply(self, lines: Mapping[str, str | None], *, version: int) -> None:
        """Applies `lines`: model -> text of its Variable; None without one, which changes nothing.

        An invalid line changes nothing and is reported in Postgres and in the log. A Variable that names no
        valid model is reported in the log and does not keep others from being applied. A limit that can
        never bind is logged. `version`: time of the read in microseconds.
        """
        for model, line in lines.items():
            if line is not None and line != self._lines.get(model):
                await self._apply_line(model, line, version)
        await self._reassert([model for model in lines if self._is_stale(model)])

    def _is_stale(self, model: str) -> bool:
        return model in self._active and time.monotonic() - self._set_at[model] > REASSERT_SECONDS

    async def _reassert(self, models: list[str]) -> None:
        """Sets targets again, in case Redis lost them: the newest, which another process may have set."""
        newest = await read_targets(self._pool) if models else {}
        for model in models:
            active = self._active[model]
            await self._set(model, *max(active, newest.get(model, active), key=lambda known: known[1]))

    async def clear_errors(self, lines: Mapping[str, str | None]) -> None:
        """Clears the errors of Variables that no longer exist; `lines` contains all that do."""
        variables = frozenset(model for model, line in lines.items() if line is not None)
        if variables != self._variables:
            await fetch(self._pool, "SELECT clear_target_errors($1)", list(variables))
            self._variables = variables

    async def _send_heartbeat(self) -> None:
        """Tells the workers that this process watches the Variables, so that they need not read them."""
        if time.monotonic() - self._heartbeat_at > HEARTBEAT_SECONDS:
            await fetch(self._pool, "SELECT watcher_heartbeat()")
            self._heartbeat_at = time.monotonic()

    async def _apply_line(self, model: str, line: str, version: int) -> None:
        try:
            check_model_name(model)
            target = await self._parse(model, line)
        except TrafficTargetError as error:
            statement = "SELECT record_target_error($1, $2, $3)"
            await fetch(self._pool, statement, model, postgres_text(line), str(error))
            self._reject(model, line, error)
            return
        except InputError as error:
            self._reject(model, line, error)
            return
        # Recorded first: a process that restores what Redis lost takes the newest target from Postgres.
        await fetch(self._pool, "SELECT record_target($1, $2, $3)", model, str(target), version)
        self.errors.pop(model, None)
        if not await self._set(model, target, version):
            return  # another reader's clock was ahead: the next read tries again
        self._lines[model] = line  # last, so that a failed write is retried
        for warning in target.warnings:
            log.warning("%s%s: %s", VARIABLE_PREFIX, model, warning)

    async def _parse(self, model: str, line: str) -> TrafficTarget:
        target = TrafficTarget.parse(line)
        statement = "SELECT 1 FROM roster WHERE model = $1 AND input_price = 0 AND output_price = 0"
        if target.money and await fetch(self._pool, statement, model):
            raise TrafficTargetError(f"{line!r} limits money, but {model} has no price: {NO_PRICE}")
        return target

    def _reject(self, model: str, line: str, error: Exception) -> None:
        self._lines[model] = line
        self.errors[model] = str(error)
        log.warning("%s%s: %s", VARIABLE_PREFIX, printable(model, MAX_NAME_CHARACTERS), first_line(error))

    async def _set(self, model: str, target: TrafficTarget, version: int) -> bool:
        """Returns False if the limiter has a newer target."""
        self._set_at[model] = time.monotonic()
        active = await self._limiter.set_target(model, target, version=version)
        if active:
            self._active[model] = (target, version)
        return active


async def read_targets(pool: asyncpg.Pool) -> dict[str, tuple[TrafficTarget, int]]:
    """Returns model -> (target, version): the last valid targets, which outlive Redis and Airflow."""
    found = await fetch(pool, "SELECT model, target, version FROM newest_targets")
    return {row["model"]: (TrafficTarget.parse(row["target"]), row["version"]) for row in found}


async def newest_target(pool: asyncpg.Pool, model: str) -> tuple[TrafficTarget, int] | None:
    """Returns the newest valid target of a model and its version; None if it never had one."""
    found = await fetch(pool, "SELECT target, version FROM newest_targets WHERE model = $1", model)
    return (TrafficTarget.parse(found[0]["target"]), found[0]["version"]) if found else None
