"""Reads bodies of replies leniently, so that an answer that can be read is kept. No I/O."""

from __future__ import annotations

import json
import re
import zlib
from typing import Any

_ANY_HEADER, _NO_HEADER = zlib.MAX_WBITS | 32, -zlib.MAX_WBITS
_WEB_PAGE = re.compile(rb"(?i)(?:<!--.*?-->\s*)*<(?:!doctype\s+html|html|head|body|title)\b")
_TITLE = re.compile(rb"(?is)<title[^>]*>(.{0,200}?)</title>")


def decompressed(content: bytes, encoding: str, limit: int) -> bytes:
    """Returns the content without its encoding, cut after `limit` + 1 bytes.

    Content that does not have the encoding that it names is returned unchanged.
    """
    names = {name.strip().lower() for name in encoding.split(",")}
    if names.isdisjoint({"gzip", "x-gzip", "deflate"}):
        return content
    for bits in (_ANY_HEADER, _NO_HEADER):
        try:
            return zlib.decompressobj(bits).decompress(content, limit + 1)
        except zlib.error:  # noqa: PERF203 - twice at most
            continue
    return content


def parse_json(content: bytes, charset: str | None = None) -> Any:
    """Parses the JSON document that the content starts with. Raises ValueError or RecursionError.

    Accepts raw control characters in texts, bytes that are not UTF-8, a byte order mark, and anything after
    the document.
    """
    return _DECODER.raw_decode(_text(content, charset).lstrip("\ufeff\0 \t\r\n"))[0]


def web_page(content: bytes, content_type: str) -> str | None:
    """Returns the title of a web page, possibly empty; None for any other content."""
    if _WEB_PAGE.match(content[:1000].lstrip()) is None and "html" not in content_type.lower():
        return None
    if content.lstrip()[:1] in (b"{", b"["):  # JSON whose type is wrong
        return None
    title = _TITLE.search(content[:4096])
    return title[1].decode("utf-8", "replace") if title else ""


def _text(content: bytes, charset: str | None) -> str:
    encoding = json.detect_encoding(content)
    if not encoding.startswith("utf-8"):
        return content.decode(encoding, "replace")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        try:
            return content.decode(charset or "utf-8", "replace")
        except LookupError:
            return content.decode("utf-8", "replace")


def _whole(digits: str) -> int | None:
    try:
        return int(digits)
    except ValueError:  # more digits than Python reads
        return None


_DECODER = json.JSONDecoder(strict=False, parse_int=_whole)
