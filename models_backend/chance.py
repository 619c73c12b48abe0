"""Deterministic randomness: the same words give the same number in every process and run."""

from __future__ import annotations

import hashlib

_DRAWS = 2**53  # distinct floats in [0, 1)


def chance(*words: object) -> float:
    """A number strictly between 0 and 1, uniform, from the hash of the words."""
    text = "\x1f".join(map(str, words)).encode("utf-8", "surrogatepass")
    number = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")
    return (number % _DRAWS + 0.5) / _DRAWS
