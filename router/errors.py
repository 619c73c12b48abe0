"""Everything the router raises on purpose, in one tree.

RouterError                     a fact, and the next step
├── ConfigError                 a file, key or environment variable is wrong; names it
│   └── TrafficTargetError      a traffic target does not parse; says where, and shows the grammar
├── DatabaseError               Postgres refused or could not be reached
│   └── SchemaError             the schema is not one that can be used or upgraded
├── LimiterError                the limiter cannot decide
│   ├── LimiterUnavailable      Redis is away or broken: nothing may be sent
│   └── PermitExpired              a permit's moment has passed unused: ask for another
├── BackendUnavailable          the Models Backend cannot be reached at all
├── CapacityExceeded                      the named model has no permit in time; says when to ask again
├── ModelFailed                    the model that was named did not answer; says why
├── CatalogError              a catalogue of models cannot be read at all; names it and what to do
├── AirflowError                Airflow's REST API refused or cannot be reached
└── InputError                  a line, row or argument that a person gave; names it

SendingPaused                        nothing may be sent now; no error, and nothing for people

What a call to a model came to is never an exception but a value: `router.task.CallResult`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class RouterError(Exception):
    """Base of all errors that the router raises on purpose. Its text is meant for people."""


class ConfigError(RouterError):
    """A configuration file, key or environment variable is wrong; the message names it."""


class TrafficTargetError(ConfigError, ValueError):
    """A traffic target does not parse. The message says what, where, and shows the grammar."""


class DatabaseError(RouterError):
    """Postgres refused a statement or could not be reached."""


class SchemaError(DatabaseError):
    """The database's schema cannot be used, or not be upgraded in place."""


class LimiterError(RouterError):
    """The limiter cannot decide; without its permit nothing is sent."""


class LimiterUnavailable(LimiterError):  # noqa: N818 - a state of the world, read as one
    """Redis is away, read-only, out of memory or has lost its memory: nothing may be sent now."""


class PermitExpired(LimiterError):  # noqa: N818 - the glossary's word
    """The permit's moment passed before the call could be written to the socket; reserve again."""


class BackendUnavailable(RouterError):  # noqa: N818 - a state of the world, read as one
    """The Models Backend cannot be reached or does not speak the configured protocol."""


class CapacityExceeded(RouterError):  # noqa: N818 - a state of the world, read as one
    """There is no room for this prompt in time; `retry_after_seconds` says when there may be."""

    def __init__(self, message: str, retry_after_seconds: float) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class ModelFailed(RouterError):  # noqa: N818 - a state of the world, read as one
    """The one model that was asked by name failed, or did not answer within the deadline."""


class CatalogError(RouterError):
    """A catalogue of models cannot be read at all; the message names it, and what to do."""


class AirflowError(RouterError):
    """Airflow refused, in its own words with its HTTP `status`, or cannot be reached: then that is None."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class InputError(RouterError):
    """A line, row or argument that a person gave is wrong; the message names it."""


class SendingPaused(Exception):  # noqa: N818 - a state of the world, read as one
    """Nothing may be sent now: the batch is held, or this process is not sure of its lease."""


def unknown(name: str, known: Iterable[str], what: str) -> InputError:
    """Returns the error for a name that is not in `known`; its text offers the closest or lists them all."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known) or 'none'}."
    return InputError(f"There is no {what} {name[:100]!r}; {hint}")


def first_line(text: str) -> str:
    """The first line of what an error says."""
    return text.splitlines()[0] if text else ""
