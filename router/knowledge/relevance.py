"""Tokens of a text, BM25 weights, and the confidence of a search result. Pure.

A text is indexed in three fields: stems of its words, heads (the first six letters of each word) and pairs of
neighboring words. A score is the weighted sum of BM25 over the fields, which ranks better than any field
alone: stems match "solve" and "solving", heads match words that the stemmer keeps apart, and pairs reward
words in the order of the query. docs/knowledge.md has the measurements.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from itertools import pairwise

WEIGHTS = {"stems": 1.0, "heads": 0.3, "pairs": 0.2}
HEAD_LETTERS = 6
MAX_WORD_LETTERS = 40
MAX_QUERY_CHARACTERS = 20_000  # the rest of a longer prompt is ignored
MAX_QUERY_STEMS = 24  # the rarest; more change the ranking little and take longer
BM25_K1 = 1.2

# Chinese and Japanese are written without spaces: each character is a word, and pairs tell texts apart.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W_\u3040-\u30ff\u3400-\u9fff]+")
_STOP_TEXT = """
    a an and are as at be but by can did do does for from had has have how i if in into is it its me my no not
    of on or our such that the their then there these they this to was we were what when where which who why
    will with you your
"""
STOP_WORDS = frozenset(_STOP_TEXT.split())


@dataclass(frozen=True, slots=True)
class Tokens:
    """Words of one text in order, without stop words, and the contents of the three fields."""

    words: tuple[str, ...]

    @property
    def stems(self) -> str:
        """Words separated by spaces; the index stems them."""
        return " ".join(self.words)

    @property
    def heads(self) -> list[str]:
        return [word[:HEAD_LETTERS] for word in self.words]

    @property
    def pairs(self) -> list[str]:
        return [f"{first}_{second}" for first, second in pairwise(self.heads)]


def tokenize(text: str) -> Tokens:
    """Splits a text into lower-case words and drops stop words."""
    words = _WORD.findall(text.lower())
    return Tokens(tuple(word[:MAX_WORD_LETTERS] for word in words if word not in STOP_WORDS))


def inverse_document_frequency(matching: int, entries: int) -> float:
    """BM25's weight of a term that `matching` of `entries` entries contain."""
    return math.log(1 + (entries - matching + 0.5) / (matching + 0.5))


@dataclass(frozen=True, slots=True)
class Evidence:
    """Features of the confidence; both from 0 to 1."""

    coverage: float = 0.0  # best score, as a share of the highest score that the query can reach
    lead: float = 0.0  # distance of the second score from the best, as a share of the best


# Fitted by `python -m bench.knowledge --calibrate`; docs/knowledge.md has the data and the errors.
COVERAGE_WEIGHT = 18.1
LEAD_WEIGHT = 2.1
BIAS = -5.8


def confidence(evidence: Evidence) -> float:
    """Probability (0 to 1) that the first entry is relevant; 0 if nothing was found."""
    if evidence.coverage <= 0:
        return 0.0
    return 1 / (1 + math.exp(-(COVERAGE_WEIGHT * evidence.coverage + LEAD_WEIGHT * evidence.lead + BIAS)))
