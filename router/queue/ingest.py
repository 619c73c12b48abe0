"""Turns the rows of prompt files into tasks: validates each field and gives every task an id.

A row is identified by its own id (`custom_id`, `external_id` or `id`), otherwise by its prompt and the number
of earlier rows of the file with the same prompt. Loading a file again therefore adds nothing. An invalid row
yields an `InvalidRow`; reading continues after it.
"""

from __future__ import annotations

import hashlib
import io
import json
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from typing import Annotated, Any

from pydantic import (
    AliasChoices,
    BaseModel,
    BeforeValidator,
    Field,
    PlainValidator,
    ValidationError,
    ValidationInfo,
)
from typing_extensions import Self

from router.errors import InputError
from router.queue.prompt_files import READERS, Fields, Format, Lines, storable
from router.request import ModelRequest

MAX_ID_CHARACTERS = 500
MAX_PRIORITY = 9
MAX_MAX_TOKENS = 10_000_000
ID_FIELDS = ("custom_id", "external_id", "id")


@dataclass(frozen=True, slots=True)
class NewTask:
    """One prompt to solve. `own_id`: whether the row contained the id."""

    line: int
    prompt: str
    external_id: str
    own_id: bool
    category: str | None
    priority: int
    max_tokens: int | None
    deadline_at: datetime | None
    client: str = ""
    request: str | None = None  # as JSON; None for a bare prompt


@dataclass(frozen=True, slots=True)
class InvalidRow:
    """A row that is not a task, and the reason."""

    line: int
    problem: str


@dataclass(frozen=True, slots=True)
class IngestDefaults:
    """Defaults for fields that a row does not set, the longest prompt accepted, and the rows' client.

    `model` takes the place of the model that a request names; `auto` lets the router choose. `check` raises
    RequestError for a request that cannot be sent.
    """

    category: str | None = None
    priority: int = 0
    max_prompt_bytes: int = 1024 * 1024
    id_prefix: str = ""
    client: str = ""
    model: str | None = None
    check: Callable[[ModelRequest], None] = lambda _request: None


def _storable(value: Any, info: ValidationInfo) -> Any:
    return storable(value, str(info.field_name)) if isinstance(value, str) else value


def _integer(value: Any) -> Any:
    with suppress(ValueError):
        return int(value) if isinstance(value, str) else value
    return value


def _digits(value: Any) -> Any:
    return str(value) if type(value) is int else value


def _utc(value: Any) -> datetime:
    try:
        time = datetime.fromisoformat(value.strip().replace("Z", "+00:00"))
        if time.tzinfo is not None:
            return time.astimezone(timezone.utc)  # Postgres accepts fewer offsets than Python
    except (ValueError, AttributeError, OverflowError):
        pass
    raise ValueError("write a time with its offset, e.g. 2026-01-31T12:00:00Z")


_Text = Annotated[str, Field(strict=True), BeforeValidator(_storable)]
_Id = Annotated[
    str,
    Field(strict=True, max_length=MAX_ID_CHARACTERS),
    BeforeValidator(_storable),
    BeforeValidator(_digits),
]
_Integer = Annotated[int, BeforeValidator(_integer), Field(strict=True)]


class _Row(BaseModel):
    prompt: _Text
    category: Annotated[_Text | None, BeforeValidator(lambda value: value or None)] = None
    external_id: _Id | None = Field(None, validation_alias=AliasChoices(*ID_FIELDS))
    priority: Annotated[_Integer, Field(ge=-MAX_PRIORITY, le=MAX_PRIORITY)] | None = None
    max_tokens: Annotated[_Integer, Field(ge=1, le=MAX_MAX_TOKENS)] | None = None
    deadline_at: Annotated[datetime, PlainValidator(_utc)] | None = None


def read_tasks(
    stream: io.BufferedReader, kind: Format, defaults: IngestDefaults
) -> Iterator[NewTask | InvalidRow]:
    """Yields each row of the file as a task, or as invalid; blank lines are skipped."""
    lines = Lines(stream)
    with _Occurrences() as occurrences:
        for number, fields in READERS[kind](lines):
            try:
                yield _task(number, fields(), defaults, occurrences)
            except InputError as error:  # noqa: PERF203 - reading continues after an invalid row
                yield InvalidRow(number, str(error))
    if lines.broken:
        yield InvalidRow(lines.number + 1, f"the file cannot be read from here on: {lines.broken}")


def _task(number: int, fields: Fields, defaults: IngestDefaults, occurrences: _Occurrences) -> NewTask:
    row = _validated(fields)
    request: ModelRequest | None = fields.get("request")
    if request is not None:
        request = replace(request, model=defaults.model or request.model)
        defaults.check(request)
    stored = None if request is None else request.stored()
    identity = row.prompt if stored is None else f"{row.prompt}\n{json.dumps(stored, sort_keys=True)}"
    size = len(row.prompt.encode())
    if not row.prompt.strip():
        raise InputError("the prompt is empty")
    if size > defaults.max_prompt_bytes:
        raise InputError(f"the prompt has {size:,} bytes; the maximum is {defaults.max_prompt_bytes:,}")
    category = row.category or defaults.category
    own_id = row.external_id
    return NewTask(
        line=number,
        prompt=row.prompt,
        external_id=(
            occurrences.id_of(identity, defaults.client) if own_id is None else defaults.id_prefix + own_id
        ),
        own_id=own_id is not None,
        category=None if category is None else category.strip().lower(),
        priority=defaults.priority if row.priority is None else row.priority,
        max_tokens=row.max_tokens,
        deadline_at=row.deadline_at,
        client=defaults.client,
        request=None if stored is None else json.dumps(stored),
    )


def _validated(fields: Fields) -> _Row:
    given = {name: value for name, value in fields.items()
             if value is not None and not (value == "" and name in ID_FIELDS)}  # fmt: skip
    try:
        return _Row.model_validate(given)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        if first["type"] == "missing":
            raise InputError("no prompt: a row needs `prompt`, or `body` with `messages`") from error
        message = first["msg"].removeprefix("Value error, ")
        raise InputError(f"{first['loc'][0]} is {str(first['input'])[:40]!r}: {message}") from error


class _Occurrences:
    """Counts how often each prompt occurred in a file, in a temporary file of SQLite to bound memory."""

    def __enter__(self) -> Self:
        self._seen = sqlite3.connect("", isolation_level=None)  # an empty name: deleted when closed
        self._seen.execute("PRAGMA journal_mode = OFF")
        self._seen.execute("CREATE TABLE seen (digest BLOB PRIMARY KEY, times INTEGER) WITHOUT ROWID")
        self._seen.execute("BEGIN")
        return self

    def __exit__(self, *_: object) -> None:
        self._seen.close()

    def id_of(self, prompt: str, client: str) -> str:
        """Counts the prompt. Returns an id: the same for its nth occurrence in any file of the client."""
        digest = hashlib.sha256(prompt.encode()).digest()[:16]
        self._seen.execute(
            "INSERT INTO seen VALUES (?, 1) ON CONFLICT (digest) DO UPDATE SET times = times + 1", (digest,)
        )
        (times,) = self._seen.execute("SELECT times FROM seen WHERE digest = ?", (digest,)).fetchone()
        return f"prompt:{client + ':' if client else ''}{digest.hex()}:{times}"
