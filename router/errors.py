"""Errors that the router raises on purpose.

Further RouterErrors are defined where they are raised: `ReviewBusy`, `SearchBusy`, `KnowledgeIndexError`.

RouterError                  base; its text names the fact and the next step
├── ConfigError              invalid configuration: names file, key or environment variable
│   └── TrafficTargetError   invalid traffic target: names the column, shows the grammar
├── DatabaseError            Postgres is unavailable or rejected a statement
│   ├── SchemaError          schema cannot be used or upgraded
│   ├── LeaseLost            lease of the worker expired: continue under a new name
│   ├── RowLocked            another transaction holds a lock for too long: try again later
│   └── InvalidValue         Postgres rejected a value: do not retry
├── LimiterError             rate limiter cannot decide
│   ├── LimiterUnavailable   Redis is unavailable: nothing may be sent
│   └── PermitExpired        permit expired unused: acquire another
├── BackendUnavailable       Models Backend is unreachable or speaks another protocol
├── CapacityExceeded         no permit in time: carries `retry_after_seconds`
├── ModelFailed              the model that was requested by name failed or timed out
├── CatalogError             catalog of models is unreadable
├── AirflowError             Airflow's REST API is unreachable or rejected a request: carries `status`
└── InputError               invalid argument, line or row: names it
    └── ContextLengthExceeded   the prompt is longer than the model, or every model, takes

SendingPaused                control flow between a worker and its call; never shown

The outcome of a call to a model is a value and not an exception: `router.task.CallResult`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

# Up to the last @ of a word, since a password may contain unencoded characters.
_LOGIN = re.compile(r"://[^\s@/]*:\S*@")


class RouterError(Exception):
    """Base of all errors that the router raises on purpose. Its text is written for users."""


class ConfigError(RouterError):
    """A configuration file, key or environment variable is invalid; the message names it."""


class TrafficTargetError(ConfigError, ValueError):
    """A traffic target does not parse; the message names the column and shows the grammar."""


class DatabaseError(RouterError):
    """Postgres is unavailable or rejected a statement."""


class SchemaError(DatabaseError):
    """The database's schema cannot be used, or cannot be upgraded in place."""


class LeaseLost(DatabaseError):  # noqa: N818 - names a state
    """The worker's lease has expired; it must continue under a new name."""


class RowLocked(DatabaseError):  # noqa: N818 - names a state
    """A statement gave up waiting for the lock of another transaction; nothing was changed."""


class InvalidValue(DatabaseError):  # noqa: N818 - names a state
    """Postgres rejected a value, or returned one that cannot be read; a retry cannot succeed."""


class LimiterError(RouterError):
    """The rate limiter cannot decide; without its permit nothing is sent."""


class LimiterUnavailable(LimiterError):  # noqa: N818 - names a state
    """Redis is unreachable, read-only, out of memory or has lost its state: nothing may be sent now.

    `cause` is one of `away`, `hung`, `read_only`, `loading`, `out_of_memory`, `forbidden`, `busy`, `failing`
    (any other error of Redis) and `database` (lost state cannot be rebuilt, as Postgres is unavailable).
    """

    def __init__(self, message: str, cause: str = "away") -> None:
        super().__init__(message)
        self.cause = cause


class PermitExpired(LimiterError):  # noqa: N818 - names a state
    """The permit expired before the call was written to the socket; acquire another."""


class BackendUnavailable(RouterError):  # noqa: N818 - names a state
    """The Models Backend is unreachable or does not speak the configured protocol."""


class CapacityExceeded(RouterError):  # noqa: N818 - names a state
    """The model cannot take the prompt in time; retry after `retry_after_seconds`."""

    def __init__(self, message: str, retry_after_seconds: float) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class ModelFailed(RouterError):  # noqa: N818 - names a state
    """The model that was requested by name failed, or did not answer within the deadline."""


class CatalogError(RouterError):
    """A catalog of models cannot be read; the message names it and the next step."""


class AirflowError(RouterError):
    """Airflow rejected a request with the HTTP `status`, or is unreachable: then `status` is None."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class InputError(RouterError):
    """An argument, line or row from a user is invalid; the message names it."""


class ContextLengthExceeded(InputError):  # noqa: N818 - names a state
    """The prompt is longer than the requested model takes, or than every model in use."""


class SendingPaused(Exception):  # noqa: N818 - names a state
    """Nothing may be sent now: the batch is paused, or this process may have lost its lease."""


def unknown(name: str, known: Iterable[str], what: str) -> InputError:
    """Returns the error for a name that is not in `known`; its text offers the closest or lists them all."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known) or 'none'}."
    return InputError(f"There is no {what} {name[:100]!r}; {hint}")


def redacted(text: str) -> str:
    """Replaces the login of every URL in a text by `***`."""
    return _LOGIN.sub("://***@", text)


def first_line(message: str | BaseException) -> str:
    """Returns the first line of an error or of its text, without logins.

    For an error without text it is the name of its class.
    """
    lines = str(message).strip().splitlines()
    if lines:
        return redacted(lines[0])
    return "" if isinstance(message, str) else type(message).__name__
