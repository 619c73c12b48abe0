"""Which category a prompt is of: rules that decide what is plain, and a classifier for the rest. Pure.

The classifier is learned from the example files each time it is built: TF-IDF of words and of character
n-grams, the rules and the prompt's shape, and a logistic regression over them. Nothing is kept on disk.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix, hstack

from router.examples import Example, read_examples
from router.prompt_features import (
    SHAPES,
    WORD_COLUMNS,
    cut,
    gram_counts,
    normal,
    plain_words,
    shapes,
    word_column,
    word_counts,
    words_of,
)
from router.settings import CategorySettings

CERTAIN = 0.99  # no rule is surer than this
CLEARLY = 0.5
SHAPE_SCALE = 0.3
RULE_SCALE = 0.35
VOCABULARY_SCALE = 2.0
REGULARISATION = 3.0
LARGEST_BATCH = 512

Numbers = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Categorised:
    """A prompt's category, how sure that is (0 to 1), and one sentence that says why."""

    category: str
    confidence: float
    reason: str


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why a prompt is of its category.

    `rules` are those that matched: category, weight, what of the prompt. `words` spoke for the category
    (above 0) or against it (below).
    """

    categorised: Categorised
    probabilities: Mapping[str, float]
    rules: tuple[tuple[str, float, str], ...]
    words: tuple[tuple[str, float], ...]
    shape: tuple[str, ...]


class Categoriser:
    """Tells categories of prompts. Thread-safe: nothing changes after `build`."""

    def __init__(self, settings: CategorySettings, examples: Sequence[Example]) -> None:
        self.settings = settings
        self._names = tuple(settings.categories)
        self._patterns = [(rule, re.compile(rule.pattern)) for rule in settings.rules if rule.pattern]
        self._words = [(rule, frozenset(rule.words.split())) for rule in settings.rules if rule.words]
        self._learn(examples)

    @classmethod
    def build(cls, settings: CategorySettings) -> Categoriser:
        """Learn from the examples that `settings` names; about a second. ConfigError names file and line."""
        return cls(settings, read_examples(settings))

    def categorise(self, prompt: str) -> Categorised:
        """The category of one prompt, whatever it holds."""
        return self.categorise_many([prompt])[0]

    def categorise_many(self, prompts: Sequence[str]) -> list[Categorised]:
        """The category of each prompt, in their order."""
        done: list[Categorised] = []
        for start in range(0, len(prompts), LARGEST_BATCH):
            batch = [cut(prompt) for prompt in prompts[start : start + LARGEST_BATCH]]
            texts = [normal(prompt) for prompt in batch]
            matches = [self._matches(text) for text in texts]
            chances = self._chances(batch, texts, matches)
            done.extend(map(self._decided, texts, matches, chances))
        return done

    def explain(self, prompt: str) -> Explanation:
        """Why this prompt is of its category, for people."""
        prompt = cut(prompt)
        text = normal(prompt)
        matches = self._matches(text)
        chances = self._chances([prompt], [text], [matches])[0]
        decided = self._decided(text, matches, chances)
        matched = [
            (rule.category, rule.weight, found.group()[:80].strip())
            for rule, pattern in self._patterns
            if (found := pattern.search(text)) is not None
        ]
        told = plain_words(text)
        vocabulary = [
            (rule.category, rule.weight, " ".join(sorted(told & words)[:8])) for rule, words in self._words
        ]
        shape = shapes([prompt], [text])[0]
        return Explanation(
            decided,
            {name: round(float(chance), 4) for name, chance in zip(self._names, chances, strict=True)},
            tuple(rule for rule in [*matched, *vocabulary] if rule[2]),
            self._telling_words(text, decided.category),
            tuple(name for name, value in zip(SHAPES, shape, strict=True) if value >= CLEARLY),
        )

    def _matches(self, text: str) -> list[float]:
        """Of each pattern 0 or 1, then of each vocabulary how much of the text is of it, 0 to 1."""
        told = plain_words(text)
        share = len(told) ** 0.5 + 1
        return [
            *(float(pattern.search(text) is not None) for _, pattern in self._patterns),
            *(min(1.0, len(told & words) / share) * VOCABULARY_SCALE for _, words in self._words),
        ]

    def _decided(self, text: str, matches: Sequence[float], chances: Numbers) -> Categorised:
        if not text:
            return Categorised(self.settings.default_category, 0.0, "default: the prompt is empty")
        weights: defaultdict[str, float] = defaultdict(float)
        for (rule, _), matched in zip(self._patterns, matches, strict=False):  # vocabularies decide nothing
            if matched:
                weights[rule.category] += rule.weight
        best = int(chances.argmax())
        if len(weights) == 1:
            ((category, weight),) = weights.items()
            if weight >= self.settings.rules_decide_at:
                chance = float(chances[self._names.index(category)])
                sure = min(CERTAIN, max(chance, 1 - 0.5**weight))
                return Categorised(
                    category, round(sure, 4), f"rules: weight {weight:g}, none for another category"
                )
        name, chance = self._names[best], float(chances[best])
        if chance < self.settings.threshold:
            return Categorised(
                self.settings.default_category, round(chance, 4),
                f"default: {name} at {chance:.2f} is below the threshold {self.settings.threshold:g}",
            )  # fmt: skip
        return Categorised(name, round(chance, 4), f"classifier: {name} at {chance:.2f}")

    # Learning.

    def _learn(self, examples: Sequence[Example]) -> None:
        from sklearn.linear_model import LogisticRegression  # noqa: PLC0415 - it takes a second
        from threadpoolctl import threadpool_limits  # noqa: PLC0415 - scikit-learn brings it

        prompts = [cut(example.prompt) for example in examples]
        texts = [normal(prompt) for prompt in prompts]
        words, grams = word_counts(texts), gram_counts(texts)
        self._word_weights, self._gram_weights = _inverse_frequency(words), _inverse_frequency(grams)
        features = self._features(
            words, grams, shapes(prompts, texts), [self._matches(text) for text in texts]
        )
        self._coefficients = np.zeros((features.shape[1], len(self._names)))
        self._intercepts = np.zeros(len(self._names))
        if len(self._names) == 1:
            return
        used = np.flatnonzero(np.asarray(features.getnnz(axis=0)) > 1)
        model = LogisticRegression(C=REGULARISATION, max_iter=80, tol=5e-4)
        labels = [self._names.index(example.category) for example in examples]
        with threadpool_limits(1):  # more would be in each other's way on a busy machine
            model.fit(features[:, used], labels, sample_weight=_weights(examples))
        self._coefficients[used] = _of_each_category(model.coef_)
        self._intercepts = _of_each_category(model.intercept_[:, None])[0]

    def _features(
        self, words: csr_matrix, grams: csr_matrix, shape: Numbers, matches: Sequence[Sequence[float]]
    ) -> csr_matrix:
        told = (
            np.array(matches, dtype=np.float64).reshape(len(matches), len(self.settings.rules)) * RULE_SCALE
        )
        return hstack(
            [
                _tfidf(words, self._word_weights),
                _tfidf(grams, self._gram_weights),
                csr_matrix(shape * SHAPE_SCALE),
                csr_matrix(told),
            ],
            format="csr",
        )

    def _scores(
        self, prompts: Sequence[str], texts: Sequence[str], matches: Sequence[Sequence[float]]
    ) -> Numbers:
        features = self._features(word_counts(texts), gram_counts(texts), shapes(prompts, texts), matches)
        scores: Numbers = features @ self._coefficients + self._intercepts
        return scores

    def _chances(
        self, prompts: Sequence[str], texts: Sequence[str], matches: Sequence[Sequence[float]]
    ) -> Numbers:
        scores = self._scores(prompts, texts, matches) / self.settings.temperature
        raised = np.exp(scores - scores.max(axis=1, keepdims=True))
        chances: Numbers = raised / raised.sum(axis=1, keepdims=True)
        return chances

    def _telling_words(self, text: str, category: str, most: int = 8) -> tuple[tuple[str, float], ...]:
        row = _tfidf(word_counts([text]), self._word_weights)
        coefficients = self._coefficients[:WORD_COLUMNS]
        own = coefficients[:, self._names.index(category)] - coefficients.mean(axis=1)
        told = row.multiply(own).tocsr()
        worth = {word: float(told[0, word_column(word)]) for word in dict.fromkeys(words_of(text))}
        strongest = sorted(worth.items(), key=lambda item: -abs(item[1]))[:most]
        return tuple((word, round(value, 3)) for word, value in strongest if value)


def _of_each_category(learned: Any) -> Any:
    """A column a category; of two categories scikit-learn gives only the second's."""
    return np.concatenate([-learned, learned]).T / 2 if len(learned) == 1 else learned.T


def _inverse_frequency(counts: csr_matrix) -> Numbers:
    seen = np.asarray(counts.getnnz(axis=0))
    weights: Numbers = np.where(seen > 0, np.log((1 + counts.shape[0]) / (1 + seen)) + 1, 0.0)
    return weights


def _tfidf(counts: csr_matrix, weights: Numbers) -> csr_matrix:
    scaled = counts.copy()
    scaled.data = (1 + np.log(counts.data)) * weights[counts.indices]
    rows = np.repeat(np.arange(counts.shape[0]), np.diff(counts.indptr))
    norms = np.sqrt(np.bincount(rows, scaled.data**2, minlength=counts.shape[0]))
    scaled.data /= np.where(norms > 0, norms, 1)[rows]
    return scaled


def _weights(examples: Sequence[Example]) -> Numbers:
    """Kinds weigh by the root of their size, and categories alike."""
    kinds = Counter((example.kind, example.category) for example in examples)
    weights = np.array([kinds[example.kind, example.category] ** -0.5 for example in examples])
    categories = np.array([example.category for example in examples])
    for category in set(categories):
        own = categories == category
        weights[own] /= weights[own].sum()
    scaled: Numbers = weights * len(examples) / len(set(categories))
    return scaled
