"""Prompts as sparse rows of numbers: hashed words and character n-grams, and what shape they have. Pure.

Hashing keeps the size bounded whatever the examples are; n-grams of a whole batch are taken at once by numpy.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from itertools import pairwise

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
FEWEST_NUMBERS = 2  # that make a sum of a question of how many

_WORD = re.compile(r"\w+|[^\w\s]")
_PLAIN = re.compile(r"[^\W_]+")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufeff]")
_DIGIT = re.compile(r"\d")
_SPACES = re.compile(r"[^\S\n]+")
_OPTION = re.compile(r"(?:^|\n)\s*\(?[a-e1-5][).:]\s")
_NUMBER = re.compile(
    r"\d+(?:[.,:/]\d+)*"
    r"|\b(?:two|three|four|five|six|seven|eight|nine|ten|dozen|half|twice|third|quarter|double)\b"
)
_HOW_MANY = re.compile(
    r"\bhow (?:many|much|long|far|old|tall|fast|big)\b|\bin total\b"
    r"|\bwhat (?:is|was|will be) (?:the|his|her|their) (?:total|average|sum)\b"
    r"|\bcu[aá]nt[oa]s?\b|\bcombien\b|\bwie ?viele?\b|\bquant[oaie]s?\b|\bile\b"
    "|\\bсколько\\b|多少|几个|いくつ|何"  # noqa: RUF001 - these are Cyrillic letters
)
_SENTENCE_END = re.compile(r"[.!?。！？]")  # noqa: RUF001 - the ends of Chinese and Japanese sentences
_QUESTION_MARKS = ("?", "？", "؟")  # noqa: RUF001 - the marks of Chinese and of Arabic
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
    pairs = [f"{first} {second}" for first, second in pairwise(words)]
    return [*words, *pairs, *openings]


def plain_words(text: str) -> set[str]:
    """The different words of a normal text, for rules that look for words."""
    return set(_PLAIN.findall(text))


def word_column(word: str) -> int:
    """The column of one of `words_of`."""
    return zlib.crc32(word.encode("utf-8", "replace")) % WORD_COLUMNS


def word_counts(texts: Sequence[str]) -> csr_matrix:
    """How often each word stands in each normal text."""
    columns: list[int] = []
    lengths: list[int] = []
    for text in texts:
        words = words_of(text)
        columns.extend(map(word_column, words))
        lengths.append(len(words))
    rows = np.repeat(np.arange(len(texts), dtype=np.int64), lengths)
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
    "short", "middling", "long", "very long", "many lines", "answer options", "signs of code",
    "ends in a question mark", "begins in lower case", "many digits", "one sentence",
    "text after a first line", "not latin letters", "numbers and a question of how many",
    "many numbers and a question",
)  # fmt: skip
_SIZES = (0, 60, 200, 700, 1 << 40)  # characters, from which a text is short, middling, long, very long
_LONGEST_FIRST_LINE = 150
_OPTIONS = 3


def shapes(prompts: Sequence[str], texts: Sequence[str]) -> NDArray[np.float64]:
    """Of each prompt and its normal text what SHAPES names, as 0 to 1."""
    both = zip(prompts, texts, strict=True)
    return np.array([[float(min(1, value)) for value in _shape(*pair)] for pair in both])


def _shape(prompt: str, text: str) -> tuple[float, ...]:
    size = len(text)
    first_line = text.find("\n")
    numbers = len(_NUMBER.findall(text))
    asks = text.endswith(_QUESTION_MARKS)
    foreign = sum(character > "\u036f" for character in text[:200])
    return (
        *(start <= size < end for start, end in pairwise(_SIZES)),
        text.count("\n") / 10,
        len(_OPTION.findall(text)) >= _OPTIONS,
        10 * len(_CODE.findall(text)) / (size + 50),
        asks,
        prompt.lstrip()[:1].islower(),
        8 * len(_DIGIT.findall(text)) / (size + 20),
        len(_SENTENCE_END.findall(text)) <= 1,
        0 < first_line < _LONGEST_FIRST_LINE < size - first_line,
        foreign > 0.3 * min(200, size or 1),
        numbers >= FEWEST_NUMBERS and _HOW_MANY.search(text) is not None,
        numbers > 2 * FEWEST_NUMBERS and asks,
    )
