"""How a text is taken apart to be found, and how sure a finding is. Pure.

A text is seen in three ways at once: the stems of its words, the first six letters of each word, and each
pair of neighbouring words. BM25 over each, added up with the weights below, finds more than any of them
alone: stems join "solve" and "solving", beginnings join what the stemmer keeps apart, pairs prefer what
stands together in the question. docs/knowledge.md has the figures.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from itertools import pairwise

WEIGHTS = {"stems": 1.0, "heads": 0.3, "pairs": 0.2}
HEAD_LETTERS = 6
LONGEST_WORD = 40
QUESTION_CHARACTERS = 20_000  # of a longer prompt the beginning is asked with
QUESTION_STEMS = 24  # the rarest; more change the finding little, and cost time
BM25_K1 = 1.2

# Chinese and Japanese are written without spaces: each character is a word, and their pairs do the work.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W_\u3040-\u30ff\u3400-\u9fff]+")
_STOP_TEXT = """
    a an and are as at be but by can did do does for from had has have how i if in into is it its me my no not
    of on or our such that the their then there these they this to was we were what when where which who why
    will with you your
"""
STOP_WORDS = frozenset(_STOP_TEXT.split())


@dataclass(frozen=True, slots=True)
class Views:
    """The words of one text, in order, as they are looked for."""

    words: tuple[str, ...]

    @property
    def stems(self) -> str:
        """Space-separated; the index takes their stems."""
        return " ".join(self.words)

    @property
    def heads(self) -> list[str]:
        return [word[:HEAD_LETTERS] for word in self.words]

    @property
    def pairs(self) -> list[str]:
        heads = self.heads
        return [f"{first}_{second}" for first, second in pairwise(heads)]


def views(text: str) -> Views:
    """The words that count: lower case, without those that stand in every English text."""
    words = _WORD.findall(text.lower())
    return Views(tuple(word[:LONGEST_WORD] for word in words if word not in STOP_WORDS))


def rarity(holding: int, entries: int) -> float:
    """BM25's inverse document frequency of a word that `holding` of `entries` entries hold."""
    return math.log(1 + (entries - holding + 0.5) / (holding + 0.5))


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a finding's relevance is judged by; both from 0 to 1."""

    coverage: float  # the best score, as a share of the most that this question can reach
    lead: float  # how far the best is ahead of the second


# Fitted by `python -m bench.knowledge --calibrate`; docs/knowledge.md says on what, and how well it holds.
COVERAGE_WEIGHT = 18.1
LEAD_WEIGHT = 2.1
BIAS = -5.8


def confidence(evidence: Evidence) -> float:
    """How likely it is, from 0 to 1, that the best entry is to the point; 0 if nothing was found."""
    if evidence.coverage <= 0:
        return 0.0
    return 1 / (1 + math.exp(-(COVERAGE_WEIGHT * evidence.coverage + LEAD_WEIGHT * evidence.lead + BIAS)))
