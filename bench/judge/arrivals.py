"""Input of the judge: the backend's arrival log and the history of targets.

Both are JSON Lines with times in seconds of one machine's monotonic clock. The judge computes in whole
nanoseconds, so that "exactly one window later" does not depend on rounding.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from router.errors import InputError, TrafficTargetError
from router.traffic import MICRO_USD, TrafficTarget

NANOSECONDS = 1_000_000_000
LATEST_SECONDS = 4e9  # fits into 64 bits of nanoseconds with room for windows
NEVER = int(np.iinfo(np.int64).max)

Integers = NDArray[np.int64]
Row = TypeVar("Row")


class Arrival(NamedTuple):
    """One call that arrived at the backend, refused ones included.

    `at` was recorded before the body was parsed; `ended_at` is None while the backend still works on it.
    Costs are in millionths of a US dollar.
    """

    at: float
    ended_at: float | None
    model: str
    request_id: str
    tokens_reserved: int = 0
    tokens_used: int | None = None
    status: int | None = None
    cost_reserved: int = 0
    cost_used: int | None = None


class TargetChange(NamedTuple):
    """The operator sets `target` for `model` at `at_seconds`."""

    at_seconds: float
    model: str
    target: TrafficTarget


class ModelLog(NamedTuple):
    """One model's arrivals as columns, in order of arrival; times in nanoseconds.

    `used` and `spent` are the tokens and the money that a call counts for after its end: as reserved
    (`reserved`, `cost`) where the log does not say.
    """

    at: Integers
    ended: Integers
    reserved: Integers
    used: Integers
    cost: Integers
    spent: Integers
    request_ids: list[str]


def nanoseconds(seconds: float) -> int:
    """`seconds` as the nearest whole number of nanoseconds."""
    return round(seconds * NANOSECONDS)


def model_log(arrivals: Iterable[Arrival]) -> ModelLog:
    """The columns of `arrivals` (all of one model), sorted stably by time."""
    rows = sorted(arrivals, key=lambda arrival: arrival.at)
    at = np.array([nanoseconds(row.at) for row in rows], dtype=np.int64)
    ended = np.array(
        [NEVER if row.ended_at is None else nanoseconds(row.ended_at) for row in rows], dtype=np.int64
    )
    reserved = np.array([row.tokens_reserved for row in rows], dtype=np.int64)
    used = np.array(
        [row.tokens_reserved if row.tokens_used is None else row.tokens_used for row in rows], dtype=np.int64
    )
    cost = np.array([row.cost_reserved for row in rows], dtype=np.int64)
    spent = np.array(
        [row.cost_reserved if row.cost_used is None else row.cost_used for row in rows], dtype=np.int64
    )
    # A call lasts at least a nanosecond, so that it counts when it arrives.
    return ModelLog(
        at, np.maximum(ended, at + 1), reserved, used, cost, spent, [row.request_id for row in rows]
    )


def read_arrivals(path: Path) -> list[Arrival]:
    """Reads an arrival log, without calls that named no model. Raises InputError with the invalid line."""
    return [arrival for arrival in _rows(path, _arrival) if arrival.model]


def read_changes(path: Path) -> list[TargetChange]:
    """Reads lines `{at_seconds, model, target}`. Raises InputError with the invalid line."""
    return list(_rows(path, _change))


def _arrival(row: dict[str, Any]) -> Arrival:
    ended_at, used, status = row.get("ended_at"), row.get("tokens_used"), row.get("status")
    return Arrival(
        at=_seconds(row["at"]),
        ended_at=None if ended_at is None else _seconds(ended_at),
        model=str(row["model"] or ""),
        request_id=str(row.get("request_id") or ""),
        tokens_reserved=int(row.get("tokens_reserved") or 0),
        tokens_used=None if used is None else int(used),
        status=None if status is None else int(status),
        cost_reserved=_micro_usd(row.get("cost_reserved")) or 0,
        cost_used=_micro_usd(row.get("cost_used")),
    )


def _change(row: dict[str, Any]) -> TargetChange:
    return TargetChange(
        _seconds(row["at_seconds"]), str(row["model"]), TrafficTarget.parse(str(row["target"]))
    )


def _micro_usd(usd: Any) -> int | None:
    return None if usd is None else round(float(usd) * MICRO_USD)


def _seconds(value: Any) -> float:
    seconds = float(value)
    if not abs(seconds) < LATEST_SECONDS:  # also refuses NaN
        raise ValueError(f"{value!r} is no time in seconds")
    return seconds


def _rows(path: Path, read: Callable[[dict[str, Any]], Row]) -> Iterator[Row]:
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _row(line, f"{path}:{number}", read)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error


def _row(line: str, place: str, read: Callable[[dict[str, Any]], Row]) -> Row:
    try:
        return read(json.loads(line))
    except KeyError as error:
        raise InputError(f"{place}: {error.args[0]} is missing.") from error
    except TrafficTargetError as error:
        raise InputError(f"{place}: {error}") from error
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        raise InputError(f"{place}: not a line of such a log: {error}") from error
