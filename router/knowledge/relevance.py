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
# Words that hardly tell what a short prompt is about, though few entries of a small index may contain them.
# They are searched for, but count little as evidence.
_SMALL_TALK_TEXT = """
    again another answer anything best better change check come continue correct could detail details
    different done easy example examples explain fine first fix get give go going good great hello help hey
    hi idea ideas improve just keep know last less let like list little long look lot make maybe mean more
    most much name need new next nice now number ok okay old one ones only other part please point possible
    problem put question quick really right run same say second see set short shorter show simple some
    something sorry sound sounds sure take tell text thank thanks thing things think time too topic try two
    understand use used using very want way well word words work working works would write wrong yes
"""
SMALL_TALK = frozenset(_SMALL_TALK_TEXT.split())
SMALL_TALK_SHARE = 0.2
CHANCE_WEIGHT = 0.75


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
    """Features of the confidence, both from 0 (`amount` from -1) to 1."""

    coverage: float = 0.0  # best score, as a share of the highest score that the query can reach
    amount: float = -1.0  # how much the words tell that the query and the best entry share; see `amount_of`


def amount_of(information: float, entries: int) -> float:
    """Amount of evidence in the words that the query and the best of `entries` share.

    `information` is the sum of their inverse document frequencies, the logarithm of how unlikely it is that
    an entry contains them all by chance. The more entries there are, the likelier it is that one does.
    """
    return math.tanh((information - CHANCE_WEIGHT * math.log(entries)) / 4)


# Fitted by `python -m bench.knowledge --calibrate`; docs/knowledge.md has the data and the errors.
COVERAGE_WEIGHT = 8.8
AMOUNT_WEIGHT = 4.5
BIAS = -6.3


def confidence(evidence: Evidence) -> float:
    """Probability (0 to 1) that the first entry is relevant; 0 if nothing was found."""
    if evidence.coverage <= 0:
        return 0.0
    return 1 / (1 + math.exp(-(COVERAGE_WEIGHT * evidence.coverage + AMOUNT_WEIGHT * evidence.amount + BIAS)))
