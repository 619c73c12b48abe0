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
import json
import logging
import re
from collections.abc import Iterable
from typing import Any

MAX_ECHOED = 300  # characters of an input that an error repeats
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# Controls (C0 but tab and line feed, DEL, C1), soft hyphens, zero-width and bidirectional marks, line
# separators, byte order marks, invisible format marks, surrogates and tags; joiners, but after letters and
# symbols that join.
_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff"
    "\ufeff\ufff9-\ufffb\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e00ff]"
    "|(?<![\u0600-\u1fff\u2190-\u2bff\ufe0f\U0001f000-\U0001faff])[\u200c\u200d]"
)
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


class ClientLimited(LimiterError):  # noqa: N818 - names a state
    """A limit of the client leaves no room in time; retry after `again_seconds`, if that is not None."""

    def __init__(self, message: str, client: str, again_seconds: float | None) -> None:
        super().__init__(message)
        self.client = client
        self.again_seconds = again_seconds


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


def printable(text: object, limit: int | None = None, *, one_line: bool = False) -> str:
    """Makes a text safe for terminals, logs and tables: nothing in it can move the cursor or start a command.

    With `limit` it is cut to so many characters; with `one_line` each run of white space is one space.
    """
    shown = str(text)
    if limit is not None and len(shown) > limit:
        shown = f"{shown[:limit]}..."
    if shown.isprintable():
        return shown
    shown = " ".join(shown.split()) if one_line else shown.replace("\r\n", "\n")
    return _UNSAFE.sub(REPLACEMENT, shown)


def echoed(value: object, limit: int = MAX_ECHOED) -> str:
    """Returns an input as errors repeat it: quoted, printable, at most `limit` characters of it."""
    quoted = repr(value[:limit] if isinstance(value, str) else value)
    is_cut = len(quoted) > limit or (isinstance(value, str) and len(value) > limit)
    return printable(f"{quoted[:limit]}..." if is_cut else quoted)


def printable_json(value: Any, **options: Any) -> str:
    """Returns a value as JSON that is safe for terminals: what is not printable is escaped, not lost."""
    return _UNSAFE.sub(_escaped, json.dumps(value, ensure_ascii=False, **options))


def _escaped(found: re.Match[str]) -> str:
    return json.dumps(found.group())[1:-1] if found.group() != "\x7f" else "\\u007f"


class PrintableRecords(logging.Handler):
    """Makes log records printable before the handlers of parent loggers write them.

    The logger `router` has one, so that this holds in every process, also where the host program configures
    logging. Where it does not, warnings go to standard error, as without this handler.
    """

    def handle(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        if not message.isprintable():
            record.msg, record.args = printable(message, one_line=True), ()
        if record.exc_info and not record.exc_text:
            record.exc_text = printable(logging.Formatter().formatException(record.exc_info))
        last = logging.lastResort
        if not logging.root.handlers and last is not None and record.levelno >= last.level:
            last.handle(record)
        return True


def unknown(name: str, known: Iterable[str], what: str) -> InputError:
    """Returns the error for a name that is not in `known`; its text offers the closest or lists them all."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known) or 'none'}."
    return InputError(f"There is no {what} {echoed(name)}; {hint}")


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
