"""Classifies prompts: rules decide clear cases, and a linear model the rest.

The linear model is trained on the example files and cached on disk; it is trained again when they change.
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

from router.classification import features as features_module
from router.classification import linear_model as model_module
from router.classification.examples import Example, example_files, read_examples
from router.classification.features import SHAPES, normalized, plain_words, shapes, shortened
from router.classification.linear_model import Features, LinearModel, Numbers, load_or_train
from router.settings import ClassificationSettings

MAX_RULE_CONFIDENCE = 0.99
SHAPE_SHOWN_FROM = 0.5
VOCABULARY_SCALE = 2.0
MAX_BATCH = 512
EXPLAINED_WORDS = 8


@dataclass(frozen=True, slots=True)
class Classification:
    """Category of a prompt, its confidence (0 to 1), and the reason in one sentence."""

    category: str
    confidence: float
    reason: str


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why a prompt was classified as it was."""

    classification: Classification
    probabilities: Mapping[str, float]  # by the model, per category
    rules: tuple[tuple[str, float, str], ...]  # those that matched: category, weight, matched text
    words: tuple[tuple[str, float], ...]  # contributions to the category, negative ones speak against it
    shape: tuple[str, ...]


class Classifier:
    """Classifies prompts. Thread-safe: immutable after `build`."""

    def __init__(self, settings: ClassificationSettings, cache: Path | None) -> None:
        self.settings = settings
        self._names = tuple(settings.categories)
        self._patterns = [(rule, re.compile(rule.pattern)) for rule in settings.rules if rule.pattern]
        self._words = [(rule, frozenset(rule.words.split())) for rule in settings.rules if rule.words]
        self._model = load_or_train(cache, _model_name(settings), self._train) if cache else self._train()

    @classmethod
    def build(cls, settings: ClassificationSettings, cache: Path | None = None) -> Classifier:
        """Trains on the examples of `settings`, which takes two seconds, or loads the model from `cache`.

        Raises ConfigError with file and line of an invalid example.
        """
        return cls(settings, cache)

    def classify(self, prompt: str) -> Classification:
        """Classifies one prompt. Accepts any text."""
        return self.classify_many([prompt])[0]

    def classify_many(self, prompts: Sequence[str]) -> list[Classification]:
        """Classifies prompts in batches; the results are in the order of `prompts`."""
        done: list[Classification] = []
        for start in range(0, len(prompts), MAX_BATCH):
            batch = [shortened(prompt) for prompt in prompts[start : start + MAX_BATCH]]
            texts = [normalized(prompt) for prompt in batch]
            matches = [self._matches(text) for text in texts]
            done.extend(map(self._decide, texts, matches, self._probabilities(batch, texts, matches)))
        return done

    def explain(self, prompt: str) -> Explanation:
        """Classifies one prompt and lists what the decision is based on."""
        prompt = shortened(prompt)
        text = normalized(prompt)
        matches = self._matches(text)
        probabilities = self._probabilities([prompt], [text], [matches])[0]
        decided = self._decide(text, matches, probabilities)
        matched = [
            (rule.category, rule.weight, found.group()[:80].strip())
            for rule, pattern in self._patterns
            if (found := pattern.search(text)) is not None
        ]
        words = plain_words(text)
        vocabulary = [
            (rule.category, rule.weight, " ".join(sorted(words & known)[:8])) for rule, known in self._words
        ]
        shape = shapes([prompt], [text])[0]
        return Explanation(
            decided,
            {name: round(float(value), 4) for name, value in zip(self._names, probabilities, strict=True)},
            tuple(rule for rule in [*matched, *vocabulary] if rule[2]),
            self._strongest_words(text, decided.category),
            tuple(name for name, value in zip(SHAPES, shape, strict=True) if value >= SHAPE_SHOWN_FROM),
        )

    def _matches(self, text: str) -> list[float]:
        """Returns 0 or 1 for each pattern, then the share of the text's words in each vocabulary, scaled."""
        words = plain_words(text)
        scale = len(words) ** 0.5 + 1
        return [
            *(float(pattern.search(text) is not None) for _, pattern in self._patterns),
            *(min(1.0, len(words & known) / scale) * VOCABULARY_SCALE for _, known in self._words),
        ]

    def _decide(self, text: str, matches: Sequence[float], probabilities: Numbers) -> Classification:
        default = self.settings.default_category
        if not text:
            return Classification(default, 0.0, "default: the prompt is empty")
        by_rules = self._decide_by_rules(matches, probabilities)
        if by_rules is not None:
            return by_rules
        best = int(probabilities.argmax())
        name, confidence = self._names[best], float(probabilities[best])
        if confidence < self.settings.threshold:
            threshold = f"the threshold {self.settings.threshold:g}"
            reason = f"default: {name} at {confidence:.2f} is below {threshold}"
            return Classification(default, round(confidence, 4), reason)
        return Classification(name, round(confidence, 4), f"classifier: {name} at {confidence:.2f}")

    def _decide_by_rules(self, matches: Sequence[float], probabilities: Numbers) -> Classification | None:
        weights: defaultdict[str, float] = defaultdict(float)
        for (rule, _), matched in zip(self._patterns, matches, strict=False):  # vocabularies do not decide
            if matched:
                weights[rule.category] += rule.weight
        if len(weights) != 1:
            return None
        ((category, weight),) = weights.items()
        if weight < self.settings.rules_decide_at:
            return None
        probability = float(probabilities[self._names.index(category)])
        confidence = min(MAX_RULE_CONFIDENCE, max(probability, 1 - 0.5**weight))
        reason = f"rules: weight {weight:g}, none for another category"
        return Classification(category, round(confidence, 4), reason)

    def _probabilities(
        self, prompts: Sequence[str], texts: Sequence[str], matches: Sequence[Sequence[float]]
    ) -> Numbers:
        """Returns the probabilities of each category against the rest, scaled to a sum of 1 per prompt."""
        scores = self._model.scores(Features(prompts, texts, matches)) / self.settings.temperature
        each = 1 / (1 + np.exp(-scores))
        probabilities: Numbers = each / each.sum(axis=1, keepdims=True)
        return probabilities

    def _strongest_words(self, text: str, category: str) -> tuple[tuple[str, float], ...]:
        contributions = self._model.word_contributions(text, self._names.index(category))
        strongest = sorted(contributions.items(), key=lambda item: -abs(item[1]))[:EXPLAINED_WORDS]
        return tuple((word, round(value, 3)) for word, value in strongest if value)

    def _train(self) -> LinearModel:
        examples = read_examples(self.settings)
        prompts = [shortened(example.prompt) for example in examples]
        texts = [normalized(prompt) for prompt in prompts]
        features = Features(prompts, texts, [self._matches(text) for text in texts])
        labels = [self._names.index(example.category) for example in examples]
        return LinearModel.train(features, labels, _sample_weights(examples), len(self._names))


def _model_name(settings: ClassificationSettings) -> str:
    """Returns a hash of everything that training depends on: settings, examples, code and libraries."""
    parts = [settings.model_dump_json(exclude={"folder"}).encode()]
    parts += [version(library).encode() for library in ("numpy", "scipy", "scikit-learn")]
    parts += [Path(code).read_bytes() for code in (__file__, model_module.__file__, features_module.__file__)]
    parts += [file.read_bytes() for file in example_files(settings)]
    digest = hashlib.sha256()
    for part in parts:
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()[:32]


def _sample_weights(examples: Sequence[Example]) -> Numbers:
    """Weights kinds by the square root of their size, and categories equally."""
    kinds = Counter((example.kind, example.category) for example in examples)
    weights = np.array([kinds[example.kind, example.category] ** -0.5 for example in examples])
    categories = np.array([example.category for example in examples])
    for category in set(categories):
        own = categories == category
        weights[own] /= weights[own].sum()
    scaled: Numbers = weights * len(examples) / len(set(categories))
    return scaled
