"""Reads files of prompts row by row: OpenAI Batch JSONL, plain JSONL, CSV and text, also gzipped.

Memory is bounded: a line is read up to MAX_LINE_BYTES. Readers yield a line number and a function that parses
the row, so that the caller handles the error of an invalid row and continues with the next one.
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

from router.errors import InputError, echoed
from router.request import REFUSED, Parameters, read_request

MAX_LINE_BYTES = 8 * 1024 * 1024
COMPLETION_URLS = ("/v1/chat/completions", "/v1/completions")
# Lone surrogates that mark invalid input in decoded lines; valid text never contains them.
NUL_MARK, TOO_LONG_MARK = "\udc00", "\udc01"
_GZIP_MAGIC = b"\x1f\x8b"
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
_DELIMITERS = ",;\t"

Fields = Mapping[str, Any]
# Fields of a plain line of JSON that belong to its request; others are not the router's, and are not read.
REQUEST_FIELDS = frozenset(
    {*Parameters.model_fields, *REFUSED, "messages", "model", "max_tokens", "max_completion_tokens"}
)
Rows = Iterator[tuple[int, Callable[[], Fields]]]


class Format(str, enum.Enum):
    """Format of a prompt file."""

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


def decompressed(stream: io.BufferedReader) -> io.BufferedReader:
    """Returns the stream, decompressed if it is gzip."""
    if stream.peek(len(_GZIP_MAGIC)).startswith(_GZIP_MAGIC):
        return io.BufferedReader(gzip.GzipFile(fileobj=stream))
    return stream


def detect_format(name: str, stream: io.BufferedReader) -> Format:
    """Detects the format by the name's suffix, otherwise by the first line, which is not consumed."""
    bare = name.lower().removesuffix(".gz")
    for suffix, kind in _SUFFIXES.items():
        if bare.endswith(suffix):
            return kind
    try:
        head = stream.peek(4096)
    except (OSError, EOFError, zlib.error):
        return Format.TEXT  # reading it reports the error
    first = head.decode("utf-8-sig", "replace").lstrip().split("\n", 1)[0]
    if first.startswith(("{", "[")):
        return Format.JSONL
    if any("prompt" in _header(first, delimiter) for delimiter in _DELIMITERS):
        return Format.CSV
    return Format.TEXT


class Lines:
    """Decoded lines of a stream, each bounded in length, with marks for invalid bytes.

    `broken` is the reason why the rest of the stream cannot be read.
    """

    def __init__(self, stream: io.BufferedReader) -> None:
        self._stream = stream
        self.number = 0
        self.broken: str | None = None

    def __iter__(self) -> Iterator[str]:
        while True:
            try:
                line = self._stream.readline(MAX_LINE_BYTES + 1)
                whole = len(line) <= MAX_LINE_BYTES
                rest = line
                while rest and not rest.endswith(b"\n"):
                    rest = self._stream.readline(MAX_LINE_BYTES)
            except (OSError, EOFError, zlib.error) as error:
                self.broken = str(error) or type(error).__name__
                return
            if self.number == 0 and line.startswith(_UTF16_MARKS):
                self.broken = "it is encoded in UTF-16; save it as UTF-8"
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
    csv.field_size_limit(MAX_LINE_BYTES)
    source = iter(lines)
    first = next(source, "")
    if not first:
        return
    delimiter = max(_DELIMITERS, key=first.count)
    header = _header(first, delimiter)
    if "prompt" not in header:
        columns = ", ".join(header)[:200] or "nothing"
        yield 1, partial(_fail, f"the header has no column `prompt`, only {columns}")
        return
    reader = csv.reader(source, delimiter=delimiter, strict=True)
    while True:
        number = lines.number + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield number, partial(_fail, f"the row that starts here is not valid CSV: {error}")
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
            f"the row has {len(cells)} cells and the header {len(header)}; quote text that contains commas"
        )
    return {name: cell for name, cell in zip(header, cells, strict=False) if cell.strip()}


def _json_fields(text: str, *, strict: bool) -> Fields:
    storable(text, "the line")
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        hint = "; write one object per line" if text.lstrip().startswith("[") else ""
        raise InputError(f"the line is not valid JSON: {error.msg} at column {error.colno}{hint}") from error
    except (RecursionError, ValueError) as error:
        raise InputError(f"the line is JSON that cannot be parsed: {type(error).__name__}") from error
    if not isinstance(value, dict):
        raise InputError("the line is not a JSON object; write one object per line")
    if strict and ("body" not in value or "custom_id" not in value):
        raise InputError("an OpenAI Batch line needs custom_id and body")
    if "body" in value:
        return {**value, **_body_fields(value)}
    given = {name: part for name, part in value.items() if name in REQUEST_FIELDS and part is not None}
    if not given.keys() - {"max_tokens"}:
        return value
    prompt = {} if "messages" in given else {"prompt": value.get("prompt")}
    found = read_request({**given, **prompt})
    return {**value, "prompt": found.conversation.text, "max_tokens": found.max_tokens, "request": found}


def _body_fields(request: Fields) -> Fields:
    body = request["body"]
    if not isinstance(body, dict):
        raise InputError("body must be a JSON object")
    if request.get("url", COMPLETION_URLS[0]) not in COMPLETION_URLS:
        raise InputError(
            f"the url is {echoed(request['url'])}; only {' and '.join(COMPLETION_URLS)} are supported"
        )
    found = read_request(body)
    return {"prompt": found.conversation.text, "max_tokens": found.max_tokens, "request": found}


def storable(text: str, name: str) -> str:
    """Returns the text. Raises InputError if it is too long, not UTF-8, or contains NUL."""
    if TOO_LONG_MARK in text:
        raise InputError(f"the line is longer than {MAX_LINE_BYTES // 1024**2} MiB")
    if "\0" in text or NUL_MARK in text:
        raise InputError(f"{name} contains a NUL character, which Postgres cannot store")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{name} is not valid UTF-8 at character {error.start + 1}") from error
    return text


def _fail(problem: str) -> NoReturn:
    raise InputError(problem)
