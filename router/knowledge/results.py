"""Results of a search: passages, and how relevant they are. Pure, and cheap to import."""

from __future__ import annotations

from dataclasses import dataclass

RELEVANT_FROM = 0.25  # confidence
ANSWER_PASSAGES = 3
ANSWER_SCORE_SHARE = 0.5  # of the best score
NO_PASSAGES = "No model answered, and no relevant passages were found."


@dataclass(frozen=True, slots=True)
class Passage:
    """Text of one entry, its source and its BM25 score. Scores compare within one search only."""

    text: str
    source: str
    score: float


@dataclass(frozen=True, slots=True)
class SearchResult:
    """Passages of one search, best first; `confidence` is the probability that the first one is relevant."""

    passages: tuple[Passage, ...] = ()
    confidence: float = 0.0

    @property
    def is_relevant(self) -> bool:
        """Whether the passages are worth showing to people or giving to a model."""
        return bool(self.passages) and self.confidence >= RELEVANT_FROM

    def as_answer(self) -> str:
        """The best passages with their sources, as the answer of last resort; NO_PASSAGES if irrelevant."""
        if not self.is_relevant:
            return NO_PASSAGES
        min_score = self.passages[0].score * ANSWER_SCORE_SHARE
        shown = [passage for passage in self.passages[:ANSWER_PASSAGES] if passage.score >= min_score]
        parts = [
            f"[{number}] {passage.text}\n(from {passage.source})" for number, passage in enumerate(shown, 1)
        ]
        heading = f"No model answered. Retrieved passages (confidence {self.confidence:.0%}):"
        return "\n\n".join([heading, *parts])
