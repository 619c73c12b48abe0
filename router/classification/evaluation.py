"""Evaluates a classifier on labeled prompts: accuracy, macro-F1, calibration error and confusion."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.metrics import f1_score

from router.classification.classifier import Classification
from router.errors import InputError, echoed
from router.files import json_lines

BINS = 10

Pairs = Sequence[tuple["LabeledPrompt", Classification]]


@dataclass(frozen=True, slots=True)
class LabeledPrompt:
    """A prompt whose category is known; `ambiguous` if the category is debatable."""

    source: str
    prompt: str
    category: str
    ambiguous: bool


@dataclass(frozen=True, slots=True)
class Scores:
    """Quality on some prompts; None without any. `confusion`: true -> predicted category -> prompts."""

    rows: int
    accuracy: float | None = None
    macro_f1: float | None = None
    calibration_error: float | None = None
    confusion: Mapping[str, Mapping[str, int]] = field(default_factory=dict)


def read_labeled(file: Path, categories: Sequence[str]) -> Iterator[LabeledPrompt]:
    """Reads JSON Lines of objects with `prompt`, `category` and, optionally, `source` and `ambiguous`.

    Raises InputError with file and line.
    """
    for place, row in json_lines(file, error=InputError):
        if not all(isinstance(row.get(key), str) for key in ("prompt", "category")):
            raise InputError(f"{place}: must have the strings prompt and category")
        if row["category"] not in categories:
            known = ", ".join(categories)
            raise InputError(f"{place}: category: {echoed(row['category'])} is unknown; known are {known}")
        source = str(row.get("source") or "unnamed")
        yield LabeledPrompt(source, row["prompt"], row["category"], bool(row.get("ambiguous")))


def evaluate_classification(
    prompts: Sequence[LabeledPrompt], predicted: Sequence[Classification]
) -> dict[str, Any]:
    """Returns scores per source and over all prompts, and the mean accuracy of the sources.

    Each with all prompts, and without the ambiguous ones.
    """
    pairs = list(zip(prompts, predicted, strict=True))
    sources = dict.fromkeys(prompt.source for prompt in prompts)
    by_source = {source: _scores([pair for pair in pairs if pair[0].source == source]) for source in sources}
    mean = {}
    for selection in ("all", "without_ambiguous"):
        accuracies = [scores[selection].accuracy for scores in by_source.values()]
        known = [accuracy for accuracy in accuracies if accuracy is not None]
        mean[selection] = _rounded(sum(known) / len(known)) if known else None
    return {"sources": by_source, "together": _scores(pairs), "mean": mean}


def _scores(pairs: Pairs) -> dict[str, Scores]:
    clear = [pair for pair in pairs if not pair[0].ambiguous]
    return {"all": _score(pairs), "without_ambiguous": _score(clear)}


def _score(pairs: Pairs) -> Scores:
    if not pairs:
        return Scores(0)
    true = [prompt.category for prompt, _ in pairs]
    predicted = [found.category for _, found in pairs]
    correct = np.array(true) == np.array(predicted)
    return Scores(
        len(pairs),
        _rounded(correct.mean()),
        _rounded(f1_score(true, predicted, labels=sorted(set(true)), average="macro", zero_division=0)),
        _rounded(_calibration_error(np.array([found.confidence for _, found in pairs]), correct)),
        _confusion(true, predicted),
    )


def _calibration_error(confidence: Any, correct: Any) -> float:
    """Expected calibration error: mean gap between confidence and accuracy over ten equal bins."""
    bins = np.minimum(BINS - 1, (confidence * BINS).astype(int))
    return float(np.abs(np.bincount(bins, weights=confidence - correct)).sum() / len(correct))


def _confusion(true: list[str], predicted: list[str]) -> dict[str, dict[str, int]]:
    counts = Counter(zip(true, predicted, strict=True))
    columns = sorted(set(predicted))
    return {
        row: {column: counts[row, column] for column in columns if counts[row, column]}
        for row in dict.fromkeys(true)
    }


def _rounded(value: Any) -> float:
    return round(float(value), 4)
