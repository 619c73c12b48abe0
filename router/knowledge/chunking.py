"""Splits texts into entries that are short enough to be shown as passages. Pure.

An entry is what the index holds; a passage (`router.knowledge.Passage`) is an entry found by a search.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass

from router.errors import InputError

MAX_CHARACTERS = 1200  # people read a passage, and a model that gets it is paid by its length
MAX_PROMPT_CHARACTERS = 600
MAX_ANSWER_CHARACTERS = 2000
MAX_TITLE_CHARACTERS = 200
TEXT_SUFFIXES = (".md", ".txt", ".rst", ".jsonl")

_HEADING = re.compile(r"(#{1,6})\s+(?=\S)(.*)")
_FENCE = re.compile(r"^\s*(```|~~~)")
_SENTENCE_END = re.compile(r"(?<=[.!?。！？])\s+")  # noqa: RUF001 - full-width marks end sentences too


@dataclass(frozen=True, slots=True)
class Entry:
    """One searchable text. The entries of one `key` are replaced and deleted together."""

    key: str
    source: str  # origin, as displayed
    title: str
    text: str
    task_id: int | None = None
    client: str | None = None  # whose task it is; None: everybody's

    @property
    def display_text(self) -> str:
        """Text of the passage: question and answer of a task, else title and text."""
        if self.task_id is not None:
            return f"Question: {self.title}\nAnswer: {self.text}"
        return f"{self.title}\n{self.text}" if self.title else self.text

    @property
    def indexed_text(self) -> str:
        """Title and text; a title that the text repeats at its beginning counts once."""
        if not self.title or self.text.startswith(self.title):
            return self.text
        return f"{self.title}\n{self.text}"


def file_entries(key: str, name: str, text: str) -> list[Entry]:
    """Splits a text file: one entry per line of JSON Lines, else one or more per Markdown section."""
    parts = _json_lines(name, text) if name.endswith(".jsonl") else _sections(name, text)
    return [Entry(key, source, title, body) for source, title, body in parts]


def task_entry(task_id: int, prompt: str, answer: str, client: str = "") -> Entry:
    """Returns the entry of a solved task; its prompt is the title."""
    question = _truncate(" ".join(prompt.split()), MAX_PROMPT_CHARACTERS)
    shortened = _truncate(answer.strip(), MAX_ANSWER_CHARACTERS)
    return Entry(task_key(task_id), f"task {task_id}", question, shortened, task_id, client)


def task_key(task_id: int) -> str:
    """Returns the key of a task's entry."""
    return f"task:{task_id}"


def decode_text(content: bytes) -> str:
    """Decodes a file's content. Raises InputError unless it is UTF-8 text that is not blank."""
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise InputError("is UTF-16; save it as UTF-8")
    if b"\x00" in content:
        raise InputError("is not text: it contains NUL bytes")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        byte = content[error.start]
        raise InputError(f"is not UTF-8 text: line {line} contains the byte 0x{byte:02x}") from error
    if not text.strip():
        raise InputError("is empty")
    return text


def _sections(name: str, text: str) -> Iterator[tuple[str, str, str]]:
    for heading, body in _by_heading(text):
        for chunk in _chunks(body):
            yield (f"{name}: {heading}" if heading else name), heading, chunk


def _by_heading(text: str) -> Iterator[tuple[str, str]]:
    """Yields (path of headings, text below it) in order; a `#` inside a code fence is not a heading."""
    path: list[str] = []
    lines: list[str] = []
    fenced = False
    for line in text.splitlines():
        if _FENCE.match(line):
            fenced = not fenced
        heading = None if fenced else _HEADING.match(line)
        if heading is None:
            lines.append(line)
            continue
        yield _path_title(path), "\n".join(lines)
        lines = []
        path = [*path[: len(heading[1]) - 1], heading[2].rstrip().rstrip("#").rstrip()]
    yield _path_title(path), "\n".join(lines)


def _path_title(path: list[str]) -> str:
    return _truncate(" / ".join(path), MAX_TITLE_CHARACTERS)


def _chunks(body: str) -> Iterator[str]:
    """Joins paragraphs up to MAX_CHARACTERS; splits a longer one between sentences, then words."""
    chunk = ""
    for paragraph in re.split(r"\n\s*\n", body):
        for part in _split_paragraph(paragraph.strip()):
            if chunk and len(chunk) + len(part) + 2 > MAX_CHARACTERS:
                yield chunk
                chunk = ""
            chunk = f"{chunk}\n\n{part}" if chunk else part
    if chunk:
        yield chunk


def _split_paragraph(paragraph: str) -> Iterator[str]:
    part = ""
    for sentence in _SENTENCE_END.split(paragraph):
        rest = sentence
        while len(rest) > MAX_CHARACTERS:
            if part:
                yield part
                part = ""
            end = rest.rfind(" ", 1, MAX_CHARACTERS)
            end = end if end > 0 else MAX_CHARACTERS
            yield rest[:end].strip()
            rest = rest[end:].strip()
        if part and len(part) + len(rest) + 1 > MAX_CHARACTERS:
            yield part
            part = ""
        part = f"{part} {rest}" if part else rest
    if part:
        yield part


def _json_lines(name: str, text: str) -> Iterator[tuple[str, str, str]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"line {number} is not valid JSON: {error}") from error
        if not isinstance(row, dict) or not isinstance(row.get("text"), str) or not row["text"].strip():
            raise InputError(f'line {number} is not an object with a "text"')
        title = row.get("title") or ""
        if not isinstance(title, str):
            raise InputError(f'line {number}: "title" is not a string')
        text_part = _truncate(row["text"], 4 * MAX_CHARACTERS)
        yield f"{name}:{number}", _truncate(title, MAX_TITLE_CHARACTERS), text_part


def _truncate(text: str, max_characters: int) -> str:
    return text if len(text) <= max_characters else text[: max_characters - 1].rstrip() + "…"
