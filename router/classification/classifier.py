"""Which category a prompt is of: rules that decide what is plain, and a classifier for the rest.

The classifier is learned from the example files; what was learned of the same ones before is taken again.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np

from router.classification import features as prompt_features
from router.classification import linear_model as classifier
from router.classification.examples import Example, example_files, read_examples
from router.classification.features import SHAPES, cut, normal, plain_words, shapes
from router.classification.linear_model import Features, LinearModel, Numbers, kept
from router.settings import ClassificationSettings

CERTAIN = 0.99  # no rule is surer than this
CLEARLY = 0.5
VOCABULARY_SCALE = 2.0
LARGEST_BATCH = 512
MOST_TELLING_WORDS = 8


@dataclass(frozen=True, slots=True)
class Classification:
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

    categorised: Classification
    probabilities: Mapping[str, float]
    rules: tuple[tuple[str, float, str], ...]
    words: tuple[tuple[str, float], ...]
    shape: tuple[str, ...]


class Classifier:
    """Tells categories of prompts. Thread-safe: nothing changes after `build`."""

    def __init__(self, settings: ClassificationSettings, learned_in: Path | None) -> None:
        self.settings = settings
        self._names = tuple(settings.categories)
        self._patterns = [(rule, re.compile(rule.pattern)) for rule in settings.rules if rule.pattern]
        self._words = [(rule, frozenset(rule.words.split())) for rule in settings.rules if rule.words]
        self._classifier = kept(learned_in, _name(settings), self._learn) if learned_in else self._learn()

    @classmethod
    def build(cls, settings: ClassificationSettings, learned_in: Path | None = None) -> Classifier:
        """Learn from the examples that `settings` names, two seconds; ConfigError names file and line.

        What was learned is kept in the folder `learned_in`, if given, for whoever builds the same again.
        """
        return cls(settings, learned_in)

    def classify(self, prompt: str) -> Classification:
        """The category of one prompt, whatever it holds."""
        return self.classify_many([prompt])[0]

    def classify_many(self, prompts: Sequence[str]) -> list[Classification]:
        """The category of each prompt, in their order."""
        done: list[Classification] = []
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

    def _decided(self, text: str, matches: Sequence[float], chances: Numbers) -> Classification:
        if not text:
            return Classification(self.settings.default_category, 0.0, "default: the prompt is empty")
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
                return Classification(
                    category, round(sure, 4), f"rules: weight {weight:g}, none for another category"
                )
        name, chance = self._names[best], float(chances[best])
        if chance < self.settings.threshold:
            return Classification(
                self.settings.default_category, round(chance, 4),
                f"default: {name} at {chance:.2f} is below the threshold {self.settings.threshold:g}",
            )  # fmt: skip
        return Classification(name, round(chance, 4), f"classifier: {name} at {chance:.2f}")

    def _chances(
        self, prompts: Sequence[str], texts: Sequence[str], matches: Sequence[Sequence[float]]
    ) -> Numbers:
        scores = self._classifier.scores(Features(prompts, texts, matches)) / self.settings.temperature
        raised = np.exp(scores - scores.max(axis=1, keepdims=True))
        chances: Numbers = raised / raised.sum(axis=1, keepdims=True)
        return chances

    def _telling_words(self, text: str, category: str) -> tuple[tuple[str, float], ...]:
        worth = self._classifier.telling_words(text, self._names.index(category))
        strongest = sorted(worth.items(), key=lambda item: -abs(item[1]))[:MOST_TELLING_WORDS]
        return tuple((word, round(value, 3)) for word, value in strongest if value)

    def _learn(self) -> LinearModel:
        examples = read_examples(self.settings)
        prompts = [cut(example.prompt) for example in examples]
        texts = [normal(prompt) for prompt in prompts]
        features = Features(prompts, texts, [self._matches(text) for text in texts])
        labels = [self._names.index(example.category) for example in examples]
        return LinearModel.learn(features, labels, _weights(examples), len(self._names))


def _name(settings: ClassificationSettings) -> str:
    """Another one wherever something else would be learned: other settings, examples, code or libraries."""
    parts = [settings.model_dump_json(exclude={"folder"}).encode()]
    parts += [version(library).encode() for library in ("numpy", "scipy", "scikit-learn")]
    parts += [Path(code).read_bytes() for code in (__file__, classifier.__file__, prompt_features.__file__)]
    parts += [file.read_bytes() for file in example_files(settings)]
    digest = hashlib.sha256()
    for part in parts:
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()[:32]


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
