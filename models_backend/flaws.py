"""The truth about the stand-in's answers: for each, its flaw, or none if it was good.

Learning is evaluated by it and must not see it: the router never reads it.
"""

from __future__ import annotations

from collections import deque
from itertools import islice
from typing import Any, NamedTuple

RECENT = 100_000


class KnownAnswer(NamedTuple):
    """One answer; `flaw` is None if it was good."""

    request_id: str | None
    model: str
    category: str
    flaw: str | None


class FlawBook:
    """Stores the last 100,000 answers."""

    def __init__(self) -> None:
        self._recent: deque[KnownAnswer] = deque(maxlen=RECENT)
        self.known = 0

    def note(self, answer: KnownAnswer) -> None:
        """Adds one answer."""
        self.known += 1
        self._recent.append(answer)

    def since(self, number: int, limit: int) -> tuple[int, list[dict[str, Any]]]:
        """Up to `limit` answers from the given number on, and the next number.

        Dropped answers are left out.
        """
        oldest = self.known - len(self._recent)
        start = max(number - oldest, 0)
        rows = [answer._asdict() for answer in islice(self._recent, start, start + limit)]
        return oldest + start + len(rows), rows
