"""Prompts as sparse rows of numbers: hashed words and character n-grams, and what shape they have. Pure.

Hashing keeps the size bounded whatever the examples are, and n-grams of a whole batch are taken at once by numpy.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

HEAD_CHARACTERS = 1200  # a prompt is known by its beginning ...
TAIL_CHARACTERS = 400  # ... and, where something long was pasted, by its end
GRAM_LENGTHS = (2, 3, 4, 5)
GRAM_COLUMNS = 1 << 17
WORD_COLUMNS = 1 << 16
WORDS_LOOKED_AT = 300
OPENING_WORDS = 3

_WORD = re.compile(r"\w+|[^\w\s]")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufeff]")
_DIGIT = re.compile(r"\d")
_SPACES = re.compile(r"[^\S\n]+")
_OPTION = re.compile(r"(?:^|\n)\s*\(?[a-e1-5][).:]\s")
_CODE = re.compile(r"[{}();=<>\[\]]")

IntArray = NDArray[np.int64]


def cut(prompt: str) -> str:
    """The prompt itself, or its head and tail where it is longer than both together."""
    if len(prompt) <= HEAD_CHARACTERS + TAIL_CHARACTERS:
        return prompt
    return f"{prompt[:HEAD_CHARACTERS]}\n{prompt[-TAIL_CHARACTERS:]}"


def normal(prompt: str) -> str:
    """What is looked at: cut, in lower case, without control characters and runs of spaces."""
    return _SPACES.sub(" ", _CONTROL.sub(" ", cut(prompt).lower())).strip()


def words_of(text: str) -> list[str]:
    """The words and signs of a normal text, every digit as 0, and the ways in which it opens."""
    words = _WORD.findall(_DIGIT.sub("0", text))[:WORDS_LOOKED_AT]
    openings = ["^" + " ".join(words[:n]) for n in range(1, min(OPENING_WORDS, len(words)) + 1)]
    pairs = [f"{first} {second}" for first, second in zip(words, words[1:])]
    return [*words, *pairs, *openings]


def word_column(word: str) -> int:
    """The column of one of `words_of`."""
    return zlib.crc32(word.encode("utf-8", "replace")) % WORD_COLUMNS


def word_counts(texts: Sequence[str]) -> csr_matrix:
    """How often each word stands in each normal text."""
    columns: list[int] = []
    lengths = np.zeros(len(texts) + 1, dtype=np.int64)
    for row, text in enumerate(texts):
        words = words_of(text)
        columns.extend(map(word_column, words))
        lengths[row + 1] = len(words)
    rows = np.repeat(np.arange(len(texts), dtype=np.int64), np.diff(np.cumsum(lengths)))
    return _counts(rows, np.array(columns, dtype=np.int64), len(texts), WORD_COLUMNS)


def gram_counts(texts: Sequence[str]) -> csr_matrix:
    """How often each run of 2 to 5 characters stands in each normal text; none goes over its end."""
    joined = "".join(f" {_DIGIT.sub('0', text)} " for text in texts).encode("utf-32-le", "replace")
    characters = np.frombuffer(joined, dtype=np.uint32).astype(np.uint64)
    rows = np.repeat(np.arange(len(texts), dtype=np.int64), [len(text) + 2 for text in texts])
    hashes = characters.copy()
    all_rows, all_columns = [], []
    for length in range(2, max(GRAM_LENGTHS) + 1):
        hashes = hashes[:-1] * np.uint64(1_000_003) + characters[length - 1 :]
        if length in GRAM_LENGTHS:
            inside = rows[: len(hashes)] == rows[length - 1 :]
            mixed = (hashes[inside] * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(64 - 17)
            all_rows.append(rows[: len(hashes)][inside])
            all_columns.append(mixed.astype(np.int64))
    return _counts(np.concatenate(all_rows), np.concatenate(all_columns), len(texts), GRAM_COLUMNS)


def _counts(rows: IntArray, columns: IntArray, height: int, width: int) -> csr_matrix:
    keys, counts = np.unique(rows * width + columns, return_counts=True)
    starts = np.searchsorted(keys, np.arange(height + 1, dtype=np.int64) * width)
    return csr_matrix((counts.astype(np.float64), keys % width, starts), shape=(height, width))


SHAPES = (
    "short", "middling", "long", "very long", "many lines", "answer options", "signs of code", "ends in a question mark",
    "begins in lower case", "many digits", "one sentence", "pasted text after the first line", "not latin letters",
)  # fmt: skip


def shapes(prompts: Sequence[str], texts: Sequence[str]) -> NDArray[np.float64]:
    """Of each prompt and its normal text what SHAPES names, as 0 to 1."""
    return np.array([_shape(prompt, text) for prompt, text in zip(prompts, texts)], dtype=np.float64)


def _shape(prompt: str, text: str) -> tuple[float, ...]:
    size = len(text)
    lines = text.count("\n")
    first_line = text.find("\n")
    start = prompt.lstrip()[:1]
    return (
        float(size < 60), float(60 <= size < 200), float(200 <= size < 700), float(size >= 700),
        min(1.0, lines / 10), float(len(_OPTION.findall(text)) >= 3),
        min(1.0, 10 * len(_CODE.findall(text)) / (size + 50)),
        float(text.endswith(("?", "？", "؟"))), float(start.islower()),
        min(1.0, 8 * len(_DIGIT.findall(text)) / (size + 20)),
        float(len(re.findall(r"[.!?。！？]", text)) <= 1), float(0 < first_line < 150 and size > first_line + 150),
        float(sum(character > "\u036f" for character in text[:200]) > 0.3 * min(200, size or 1)),
    )  # fmt: skip
