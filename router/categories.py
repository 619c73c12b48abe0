"""Which category a prompt is of: rules that decide what is plain, and a classifier for the rest. Pure.

The classifier is learned from the example files each time it is built: TF-IDF of words and of character n-grams, the
rules and the prompt's shape, and a logistic regression over them. Nothing is kept on disk.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix, hstack

from router.errors import ConfigError
from router.prompt_features import (
    SHAPES,
    WORD_COLUMNS,
    cut,
    gram_counts,
    normal,
    shapes,
    word_column,
    word_counts,
    words_of,
)
from router.settings import CategorySettings

CERTAIN = 0.99  # no rule is surer than this
SHAPE_SCALE = 0.3
RULE_SCALE = 0.5
REGULARISATION = 8.0
LARGEST_BATCH = 512
FEWEST_EXAMPLES = 3

Numbers = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Categorised:
    """A prompt's category, how sure that is (0 to 1), and one sentence that says why."""

    category: str
    confidence: float
    reason: str


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why a prompt is of its category: each category's probability, the rules that matched, and what words spoke for
    it (positive) or for another one (negative)."""

    categorised: Categorised
    probabilities: Mapping[str, float]
    rules: tuple[tuple[str, float, str], ...]  # category, weight, what of the prompt matched
    words: tuple[tuple[str, float], ...]
    shape: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Example:
    """One line of an example file."""

    prompt: str
    category: str
    kind: str


class Categoriser:
    """Tells categories of prompts. Thread-safe: nothing changes after `build`."""

    def __init__(self, settings: CategorySettings, examples: Sequence[Example]) -> None:
        self.settings = settings
        self._names = tuple(settings.categories)
        self._rules = [(rule, re.compile(rule.pattern)) for rule in settings.rules]
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
        rules = tuple(
            (rule.category, rule.weight, found.group()[:80].strip())
            for (rule, pattern), matched in zip(self._rules, matches)
            if matched and (found := pattern.search(text)) is not None
        )
        shape = shapes([prompt], [text])[0]
        return Explanation(
            decided,
            {name: round(float(chance), 4) for name, chance in zip(self._names, chances)},
            rules,
            self._telling_words(text, decided.category),
            tuple(name for name, value in zip(SHAPES, shape) if value >= 0.5),  # noqa: PLR2004 - half of all
        )

    def _matches(self, text: str) -> list[bool]:
        return [pattern.search(text) is not None for _, pattern in self._rules]

    def _decided(self, text: str, matches: Sequence[bool], chances: Numbers) -> Categorised:
        if not text:
            return Categorised(self.settings.default_category, 0.0, "default: the prompt is empty")
        weights: Counter[str] = Counter()
        for (rule, _), matched in zip(self._rules, matches):
            if matched:
                weights[rule.category] += rule.weight
        best = int(chances.argmax())
        if len(weights) == 1:
            ((category, weight),) = weights.items()
            if weight >= self.settings.rules_decide_at:
                chance = float(chances[self._names.index(category)])
                sure = min(CERTAIN, max(chance, 1 - 0.5 ** weight))
                return Categorised(category, round(sure, 4), f"rules: weight {weight:g}, none for another category")
        name, chance = self._names[best], float(chances[best])
        if chance < self.settings.threshold:
            return Categorised(
                self.settings.default_category, round(chance, 4),
                f"default: {name} is likeliest at {chance:.2f}, below the threshold {self.settings.threshold:g}",
            )  # fmt: skip
        return Categorised(name, round(chance, 4), f"classifier: {name} at {chance:.2f}")

    # Learning.

    def _learn(self, examples: Sequence[Example]) -> None:
        from sklearn.linear_model import LogisticRegression  # noqa: PLC0415 - takes a second, and only builders need it

        prompts = [cut(example.prompt) for example in examples]
        texts = [normal(prompt) for prompt in prompts]
        words, grams = word_counts(texts), gram_counts(texts)
        self._word_weights, self._gram_weights = _inverse_frequency(words), _inverse_frequency(grams)
        features = self._features(words, grams, shapes(prompts, texts), [self._matches(text) for text in texts])
        self._used = np.flatnonzero(np.asarray(features.getnnz(axis=0)) >= 2)
        model = LogisticRegression(C=REGULARISATION, max_iter=60, tol=1e-3)
        labels = [self._names.index(example.category) for example in examples]
        model.fit(features[:, self._used], labels, sample_weight=_weights(examples))
        self._coefficients = np.zeros((features.shape[1], len(self._names)))
        self._coefficients[self._used] = model.coef_.T if len(self._names) > 2 else _both(model.coef_)
        self._intercepts = model.intercept_ if len(self._names) > 2 else _both(model.intercept_[None])[0]

    def _features(
        self, words: csr_matrix, grams: csr_matrix, shape: Numbers, matches: Sequence[Sequence[bool]]
    ) -> csr_matrix:
        told = np.array(matches, dtype=np.float64).reshape(len(matches), len(self._rules)) * RULE_SCALE
        return hstack(
            [
                _tfidf(words, self._word_weights),
                _tfidf(grams, self._gram_weights),
                csr_matrix(shape * SHAPE_SCALE),
                csr_matrix(told),
            ],
            format="csr",
        )

    def _scores(self, prompts: Sequence[str], texts: Sequence[str], matches: Sequence[Sequence[bool]]) -> Numbers:
        features = self._features(word_counts(texts), gram_counts(texts), shapes(prompts, texts), matches)
        scores: Numbers = features @ self._coefficients + self._intercepts
        return scores

    def _chances(self, prompts: Sequence[str], texts: Sequence[str], matches: Sequence[Sequence[bool]]) -> Numbers:
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


def _both(one_sided: Any) -> Any:
    """The two classes' scores from what scikit-learn gives of the second alone."""
    return np.concatenate([-one_sided.T, one_sided.T], axis=1) / 2


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


# The examples.


def read_examples(settings: CategorySettings) -> list[Example]:
    """All examples that `settings` names; ConfigError names file and line, or the category that has too few."""
    examples: list[Example] = []
    for pattern in settings.examples:
        files = sorted(settings.folder.glob(pattern))
        if not files:
            raise ConfigError(f"{settings.folder / 'categories.yaml'}: examples: no file matches {pattern!r}")
        for file in files:
            examples.extend(_examples_of(file, settings))
    for category in settings.categories:
        number = sum(example.category == category for example in examples)
        if number < FEWEST_EXAMPLES:
            raise ConfigError(
                f"{settings.folder / 'categories.yaml'}: categories.{category}: has {number} examples, and needs"
                f" at least {FEWEST_EXAMPLES}; write them into a file that `examples` names."
            )
    return examples


def _examples_of(file: Path, settings: CategorySettings) -> list[Example]:
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} cannot be read as UTF-8 text: {error}") from error
    return [
        _example(line, f"{file}, line {number}", settings)
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]


def _example(line: str, where: str, settings: CategorySettings) -> Example:
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{where}: not a line of JSON: {error}") from error
    wanted = {"prompt", "category", "kind"}
    if not isinstance(fields, dict) or set(fields) != wanted or not all(isinstance(v, str) for v in fields.values()):
        raise ConfigError(f"{where}: must be an object with the texts prompt, category and kind, and nothing else")
    if fields["category"] not in settings.categories:
        raise ConfigError(f"{where}: category: {fields['category']!r} is not named in categories.yaml")
    if not fields["prompt"].strip():
        raise ConfigError(f"{where}: prompt: is empty")
    return Example(fields["prompt"], fields["category"], fields["kind"])
