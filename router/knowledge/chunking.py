"""What knowledge is made of: texts split into entries that are short enough to be shown. No I/O.

An entry is what is found; a passage (`router.knowledge.Passage`) is an entry as it was found for a question.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass

from router.errors import InputError

LONGEST_CHARACTERS = 1200  # a passage is read by people, and by a model that is paid by its length
LONGEST_PROMPT_CHARACTERS = 600
LONGEST_ANSWER_CHARACTERS = 2000
LONGEST_TITLE_CHARACTERS = 200
TEXT_SUFFIXES = (".md", ".txt", ".rst", ".jsonl")

_HEADING = re.compile(r"^(#{1,6})\s+(.+?)\s*#*$")
_FENCE = re.compile(r"^\s*(```|~~~)")
_SENTENCE_END = re.compile(r"(?<=[.!?。！？])\s+")  # noqa: RUF001 - full-width marks end sentences too


@dataclass(frozen=True, slots=True)
class Entry:
    """One text that can be found. All entries of a `key` are replaced and forgotten together."""

    key: str
    source: str  # where from, as it is shown to people
    title: str
    text: str
    task_id: int | None = None

    @property
    def shown(self) -> str:
        """The passage as it is read: a task's question and answer, else heading and text."""
        if self.task_id is not None:
            return f"Question: {self.title}\nAnswer: {self.text}"
        return f"{self.title}\n{self.text}" if self.title else self.text

    @property
    def searched(self) -> str:
        """Title and text; a title that the text begins with is not counted twice."""
        if not self.title or self.text.startswith(self.title):
            return self.text
        return f"{self.title}\n{self.text}"


def file_entries(key: str, name: str, text: str) -> list[Entry]:
    """The entries of a text file: one a section or less of Markdown, one a line of JSON lines."""
    parts = _lines_of_json(name, text) if name.endswith(".jsonl") else _sections(name, text)
    return [Entry(key, source, title, body) for source, title, body in parts]


def task_entry(task_id: int, prompt: str, answer: str) -> Entry:
    """The entry of a task that was solved well: its question is the title."""
    question = _cut(" ".join(prompt.split()), LONGEST_PROMPT_CHARACTERS)
    return Entry(
        task_key(task_id),
        f"task {task_id}",
        question,
        _cut(answer.strip(), LONGEST_ANSWER_CHARACTERS),
        task_id,
    )


def task_key(task_id: int) -> str:
    return f"task:{task_id}"


def text_of(content: bytes) -> str:
    """The text of a file's bytes; InputError says why they are none."""
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise InputError("is UTF-16; save it as UTF-8")
    if b"\x00" in content:
        raise InputError("is not text: it holds NUL bytes")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"is not UTF-8 text: line {line} holds the byte 0x{content[error.start]:02x}"
        ) from error
    if not text.strip():
        raise InputError("is empty")
    return text


def _sections(name: str, text: str) -> Iterator[tuple[str, str, str]]:
    for heading, body in _by_heading(text):
        for piece in _pieces(body):
            yield (f"{name}: {heading}" if heading else name), heading, piece


def _by_heading(text: str) -> Iterator[tuple[str, str]]:
    """(path of headings, text beneath) in order; a # within a fence of code is no heading."""
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
        yield _joined(path), "\n".join(lines)
        lines = []
        path = [*path[: len(heading[1]) - 1], heading[2]]
    yield _joined(path), "\n".join(lines)


def _joined(path: list[str]) -> str:
    return _cut(" / ".join(path), LONGEST_TITLE_CHARACTERS)


def _pieces(body: str) -> Iterator[str]:
    """Paragraphs together, up to LONGEST_CHARACTERS; a longer one is split between sentences, then words."""
    piece = ""
    for paragraph in re.split(r"\n\s*\n", body):
        for part in _bounded(paragraph.strip()):
            if piece and len(piece) + len(part) + 2 > LONGEST_CHARACTERS:
                yield piece
                piece = ""
            piece = f"{piece}\n\n{part}" if piece else part
    if piece:
        yield piece


def _bounded(paragraph: str) -> Iterator[str]:
    part = ""
    for sentence in _SENTENCE_END.split(paragraph):
        rest = sentence
        while len(rest) > LONGEST_CHARACTERS:
            if part:
                yield part
                part = ""
            end = rest.rfind(" ", 1, LONGEST_CHARACTERS)
            end = end if end > 0 else LONGEST_CHARACTERS
            yield rest[:end].strip()
            rest = rest[end:].strip()
        if part and len(part) + len(rest) + 1 > LONGEST_CHARACTERS:
            yield part
            part = ""
        part = f"{part} {rest}" if part else rest
    if part:
        yield part


def _lines_of_json(name: str, text: str) -> Iterator[tuple[str, str, str]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"line {number} is not JSON: {error}") from error
        if not isinstance(row, dict) or not isinstance(row.get("text"), str) or not row["text"].strip():
            raise InputError(f'line {number} is no object with a "text"')
        title = row.get("title") or ""
        if not isinstance(title, str):
            raise InputError(f'line {number}: "title" must be text')
        yield (
            f"{name}:{number}",
            _cut(title, LONGEST_TITLE_CHARACTERS),
            _cut(row["text"], 4 * LONGEST_CHARACTERS),
        )


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[: longest - 1].rstrip() + "…"
