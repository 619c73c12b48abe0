"""Rows of prompt files, made into tasks: each field checked, and every task given an id.

A task is known by the id that its row names (`custom_id`, `external_id` or `id`), else by its prompt and the
number of times that the same file has asked it before: so the same file again holds nothing new. A row that
makes no task is a `InvalidRow` with its number, and reading goes on after it.
"""

from __future__ import annotations

import hashlib
import io
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from typing_extensions import Self

from router.errors import InputError
from router.queue.prompt_files import READERS, Fields, Format, Lines, clean

LONGEST_ID_CHARACTERS = 500
LARGEST_PRIORITY = 9
LARGEST_MAX_TOKENS = 10_000_000
ID_FIELDS = ("custom_id", "external_id", "id")


@dataclass(frozen=True, slots=True)
class NewTask:
    """One prompt to be solved, as it came in. `own_id` tells whether the row itself named its id."""

    line: int
    prompt: str
    external_id: str
    own_id: bool
    category: str | None
    priority: int
    max_tokens: int | None
    deadline_at: datetime | None


@dataclass(frozen=True, slots=True)
class InvalidRow:
    """A line that holds no task, and why."""

    line: int
    problem: str


@dataclass(frozen=True, slots=True)
class IngestDefaults:
    """What holds for every row: defaults where it says nothing, and the longest prompt that can be sent."""

    category: str | None = None
    priority: int = 0
    max_prompt_bytes: int = 1024 * 1024
    id_prefix: str = ""


def read_tasks(
    stream: io.BufferedReader, kind: Format, rules: IngestDefaults
) -> Iterator[NewTask | InvalidRow]:
    """Every task of the file, and every line that should hold one but does not; empty lines do not count."""
    lines = Lines(stream)
    rows = READERS[kind]
    with _Occurrences() as occurrences:
        for number, fields in rows(lines):
            try:
                yield _task(number, fields(), rules, occurrences)
            except InputError as error:  # noqa: PERF203 - a bad line must not end the others
                yield InvalidRow(number, str(error))
    if lines.broken:
        yield InvalidRow(lines.number + 1, f"the file cannot be read from here on: {lines.broken}")


def _task(number: int, fields: Fields, rules: IngestDefaults, occurrences: _Occurrences) -> NewTask:
    prompt = fields.get("prompt")
    if prompt is None:
        raise InputError("no prompt: a row needs `prompt`, or `body` with `messages`")
    if not isinstance(prompt, str):
        raise InputError("the prompt is no text")
    size = len(clean(prompt, "the prompt").encode())
    if not prompt.strip():
        raise InputError("the prompt is empty")
    if size > rules.max_prompt_bytes:
        raise InputError(f"the prompt has {size:,} bytes, and at most {rules.max_prompt_bytes:,} are sent")
    category = fields.get("category") or rules.category
    if category is not None and not isinstance(category, str):
        raise InputError("the category is no text")
    own_id = _own_id(fields)
    return NewTask(
        line=number,
        prompt=prompt,
        own_id=own_id is not None,
        category=None if category is None else clean(category, "the category").strip().lower(),
        priority=_whole(fields, "priority", -LARGEST_PRIORITY, LARGEST_PRIORITY, rules.priority),
        max_tokens=_whole(fields, "max_tokens", 1, LARGEST_MAX_TOKENS, None),
        deadline_at=_moment(fields.get("deadline_at")),
        # Last, so that a row which is refused is not counted.
        external_id=occurrences.name(prompt) if own_id is None else rules.id_prefix + own_id,
    )


def _own_id(fields: Fields) -> str | None:
    for name in ID_FIELDS:
        value = fields.get(name)
        if value is None or value == "":
            continue
        if isinstance(value, bool) or not isinstance(value, (str, int)):
            raise InputError(f"{name} is neither text nor a whole number")
        text = clean(str(value), name)
        if len(text) > LONGEST_ID_CHARACTERS:
            raise InputError(f"{name} has {len(text)} characters; at most {LONGEST_ID_CHARACTERS} are kept")
        return text
    return None


def _whole(fields: Fields, name: str, least: int, most: int, default: Any) -> Any:
    value = fields.get(name)
    if value is None:
        return default
    try:
        number = int(value) if isinstance(value, str) else value
    except ValueError:
        number = None
    if isinstance(number, bool) or not isinstance(number, int) or not least <= number <= most:
        raise InputError(f"{name} is {str(value)[:40]!r}; it must be a whole number from {least} to {most:,}")
    return number


def _moment(value: Any) -> datetime | None:
    if value is None:
        return None
    moment: datetime | None
    try:
        moment = datetime.fromisoformat(value.strip().replace("Z", "+00:00"))
        # In UTC, since Postgres takes fewer offsets than Python.
        moment = None if moment.tzinfo is None else moment.astimezone(timezone.utc)
    except (ValueError, AttributeError, OverflowError):
        moment = None
    if moment is None:
        raise InputError(
            f"deadline_at is {str(value)[:40]!r}; write a moment and its offset, e.g. 2026-01-31T12:00:00Z"
        )
    return moment


class _Occurrences:
    """How often each prompt was asked in this file; kept in SQLite's temporary file, not in memory."""

    def __enter__(self) -> Self:
        self._seen = sqlite3.connect(
            "", isolation_level=None
        )  # the empty name: private, and gone when closed
        self._seen.execute("PRAGMA journal_mode = OFF")
        self._seen.execute("CREATE TABLE seen (digest BLOB PRIMARY KEY, times INTEGER) WITHOUT ROWID")
        self._seen.execute("BEGIN")
        return self

    def __exit__(self, *_: object) -> None:
        self._seen.close()

    def name(self, prompt: str) -> str:
        """An id for this prompt: the same for the nth time it is asked, whatever the file."""
        digest = hashlib.sha256(prompt.encode()).digest()[:16]
        times = 1
        if not self._seen.execute("INSERT OR IGNORE INTO seen VALUES (?, 1)", (digest,)).rowcount:
            self._seen.execute("UPDATE seen SET times = times + 1 WHERE digest = ?", (digest,))
            times = self._seen.execute("SELECT times FROM seen WHERE digest = ?", (digest,)).fetchone()[0]
        return f"prompt:{digest.hex()}:{times}"
