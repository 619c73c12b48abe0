"""Repeatable chance: the same words always draw the same number, in every process and on every run."""

from __future__ import annotations

import hashlib

_DRAWS = 2**53  # as many as a float tells apart


def chance(*words: object) -> float:
    """A number strictly between 0 and 1, drawn evenly from the words' hash."""
    text = "\x1f".join(map(str, words)).encode("utf-8", "surrogatepass")
    number = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")
    return (number % _DRAWS + 0.5) / _DRAWS
