"""Files of prompts, taken apart row by row: OpenAI Batch JSONL, plain JSONL, CSV and text, also gzipped.

Memory stays bounded whatever the file: a line is read up to LONGEST_LINE_BYTES. A row is read only when it is
asked for, so that what is wrong with one is raised where rows are counted, and the next one is still read.
"""

from __future__ import annotations

import csv
import enum
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NoReturn

from router.errors import InputError
from router.queue.chat import prompt_of

LONGEST_LINE_BYTES = 8 * 1024 * 1024
COMPLETION_URLS = ("/v1/chat/completions", "/v1/completions")
# What decoding leaves where bytes cannot be text; no valid text holds these.
NUL_MARK, TOO_LONG_MARK = "\udc00", "\udc01"
_GZIP_MAGIC = b"\x1f\x8b"
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
_DELIMITERS = ",;\t"

Fields = Mapping[str, Any]
Rows = Iterator[tuple[int, Callable[[], Fields]]]


class Format(str, enum.Enum):
    """How a file holds its prompts."""

    OPENAI = "openai"
    JSONL = "jsonl"
    CSV = "csv"
    TEXT = "text"


_SUFFIXES = {
    ".jsonl": Format.JSONL,
    ".ndjson": Format.JSONL,
    ".csv": Format.CSV,
    ".tsv": Format.CSV,
    ".txt": Format.TEXT,
}


def unpacked(stream: io.BufferedReader) -> io.BufferedReader:
    """The stream itself, or what is in it where it is gzip."""
    if stream.peek(len(_GZIP_MAGIC)).startswith(_GZIP_MAGIC):
        return io.BufferedReader(gzip.GzipFile(fileobj=stream))
    return stream


def detect_format(name: str, stream: io.BufferedReader) -> Format:
    """The format by the name's suffix, else by the first line, which stays unread."""
    bare = name.lower().removesuffix(".gz")
    for suffix, kind in _SUFFIXES.items():
        if bare.endswith(suffix):
            return kind
    try:
        head = stream.peek(4096)
    except (OSError, EOFError, zlib.error):
        return Format.TEXT  # reading it will say what is wrong
    first = head.decode("utf-8-sig", "replace").lstrip().split("\n", 1)[0]
    if first.startswith(("{", "[")):
        return Format.JSONL
    if any("prompt" in _header(first, delimiter) for delimiter in _DELIMITERS):
        return Format.CSV
    return Format.TEXT


class Lines:
    """The lines of a stream as text, with marks where bytes are none; each bounded in length."""

    def __init__(self, stream: io.BufferedReader) -> None:
        self._stream = stream
        self.number = 0
        self.broken: str | None = None

    def __iter__(self) -> Iterator[str]:
        while True:
            try:
                line = self._stream.readline(LONGEST_LINE_BYTES + 1)
                whole = len(line) <= LONGEST_LINE_BYTES
                rest = line
                while rest and not rest.endswith(b"\n"):
                    rest = self._stream.readline(LONGEST_LINE_BYTES)
            except (OSError, EOFError, zlib.error) as error:
                self.broken = str(error) or type(error).__name__
                return
            if self.number == 0 and line.startswith(_UTF16_MARKS):
                self.broken = "it is UTF-16; save it as UTF-8"
                return
            if not line:
                return
            self.number += 1
            if self.number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            yield line.decode("utf-8", "surrogateescape").replace("\0", NUL_MARK) if whole else TOO_LONG_MARK


def _json_rows(lines: Lines, *, strict: bool = False) -> Rows:
    for text in lines:
        if text.strip():
            yield lines.number, partial(_json_fields, text, strict=strict)


def _text_rows(lines: Lines) -> Rows:
    for text in lines:
        if text.strip():
            yield lines.number, partial(_text_fields, text)


def _csv_rows(lines: Lines) -> Rows:
    csv.field_size_limit(LONGEST_LINE_BYTES)
    source = iter(lines)
    first = next(source, "")
    if not first:
        return
    delimiter = max(_DELIMITERS, key=first.count)
    header = _header(first, delimiter)
    if "prompt" not in header:
        why = f"the header names no column `prompt`, only {', '.join(header)[:200] or 'nothing'}"
        yield 1, partial(_refuse, why)
        return
    reader = csv.reader(source, delimiter=delimiter, strict=True)
    while True:
        number = lines.number + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            why = f"the row that begins here is no CSV: {error}"
            yield number, partial(_refuse, why)
            continue
        if cells:
            yield number, partial(_csv_fields, header, cells)


def _text_fields(text: str) -> Fields:
    return {"prompt": text.rstrip("\r\n")}


READERS: dict[Format, Callable[[Lines], Rows]] = {
    Format.OPENAI: partial(_json_rows, strict=True),
    Format.JSONL: _json_rows,
    Format.CSV: _csv_rows,
    Format.TEXT: _text_rows,
}


def _header(line: str, delimiter: str) -> list[str]:
    try:
        cells = next(csv.reader([line], delimiter=delimiter), [])
    except csv.Error:
        return []
    return [cell.strip().lower() for cell in cells]


def _csv_fields(header: list[str], cells: list[str]) -> Fields:
    if len(cells) > len(header):
        raise InputError(
            f"the row has {len(cells)} cells, and the header {len(header)}: quote a text that holds commas"
        )
    return {name: cell for name, cell in zip(header, cells, strict=False) if cell.strip()}


def _json_fields(text: str, *, strict: bool) -> Fields:
    clean(text, "the line")
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        hint = "; write one object a line" if text.lstrip().startswith("[") else ""
        raise InputError(f"the line is no JSON: {error.msg} at column {error.colno}{hint}") from error
    except (RecursionError, ValueError) as error:
        raise InputError(f"the line is JSON that cannot be read: {type(error).__name__}") from error
    if not isinstance(value, dict):
        raise InputError("the line is no JSON object; write one object a line")
    if strict and ("body" not in value or "custom_id" not in value):
        raise InputError("an OpenAI Batch line needs custom_id and body")
    if "body" in value or "messages" in value:
        return {**value, **_chat_fields(value)}
    return value


def _chat_fields(request: Fields) -> Fields:
    body = request.get("body", request)
    if not isinstance(body, dict):
        raise InputError("body is no JSON object")
    if request.get("url", COMPLETION_URLS[0]) not in COMPLETION_URLS:
        raise InputError(f"the url is {request['url']!r}; only {' and '.join(COMPLETION_URLS)} can be solved")
    limit = body.get("max_completion_tokens", body.get("max_tokens"))
    prompt = prompt_of(body["messages"]) if "messages" in body else body.get("prompt")
    return {"prompt": prompt, "max_tokens": limit}


def clean(text: str, what: str) -> str:
    """The text, if Postgres can keep it."""
    if TOO_LONG_MARK in text:
        raise InputError(f"the line is longer than {LONGEST_LINE_BYTES // 1024**2} MiB")
    if "\0" in text or NUL_MARK in text:
        raise InputError(f"{what} holds a NUL character, which cannot be kept")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{what} is not UTF-8 at character {error.start + 1}") from error
    return text


def _refuse(problem: str) -> NoReturn:
    raise InputError(problem)
