"""Output that is safe for terminals: nothing that a model, file, Variable or client wrote can control one.

Two classes see all output: `SafeStream` whatever is written to the standard streams, and `SafeConsole` what
rich lays out, whose own control sequences it keeps. Both use `router.errors.printable`.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from router.errors import printable

PIPED_COLUMNS = 120  # rich would wrap piped tables at 80


class SafeStream(io.TextIOBase):
    """Text stream that makes what is written to it printable. It has no `buffer` to write around it."""

    def __init__(self, stream: TextIO) -> None:
        self.unguarded = stream

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self.unguarded.encoding

    @property
    def errors(self) -> str | None:  # type: ignore[override]
        return self.unguarded.errors

    def write(self, text: str, /) -> int:
        if not isinstance(text, str):  # programs try whether a stream takes bytes
            raise TypeError(f"write() needs a text, not {type(text).__name__}")
        self.unguarded.write(printable(text))
        return len(text)

    def flush(self) -> None:
        self.unguarded.flush()

    def isatty(self) -> bool:
        return self.unguarded.isatty()

    def fileno(self) -> int:
        return self.unguarded.fileno()

    def writable(self) -> bool:
        return True


class SafeConsole(Console):
    """Console that reads no markup in texts, and makes what it prints printable."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else _safe(segment)


def _safe(segment: Segment) -> Segment:
    style = segment.style.update_link() if segment.style and segment.style.link else segment.style
    return Segment(printable(segment.text), style)


def guard_streams() -> None:
    """Makes everything that this process prints printable, error messages and tracebacks included."""
    if not isinstance(sys.stdout, SafeStream):
        sys.stdout = SafeStream(sys.stdout)
    if not isinstance(sys.stderr, SafeStream):
        sys.stderr = SafeStream(sys.stderr)


def console(*, stderr: bool = False) -> SafeConsole:
    """Returns a console on a standard stream."""
    stream = _unguarded(sys.stderr if stderr else sys.stdout)
    width = None if stream.isatty() or os.environ.get("COLUMNS") else PIPED_COLUMNS
    return SafeConsole(file=stream, width=width, soft_wrap=False)


def write_data(text: str) -> None:
    """Writes a text to standard output: exactly into a file or pipe, printable on a terminal."""
    stream = _unguarded(sys.stdout)
    stream.write(f"{printable(text) if stream.isatty() else text}\n")
    stream.flush()


def _unguarded(stream: Any) -> TextIO:
    return stream.unguarded if isinstance(stream, SafeStream) else stream
