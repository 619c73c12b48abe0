"""Fits and tests the confidence of search results (router/knowledge/relevance.py)."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from router.knowledge.evaluation import Collection
from router.knowledge.index import KnowledgeIndex
from router.knowledge.relevance import Evidence, confidence, tokenize

MAX_FOREIGN = 400
SMALL_INDEX = 60  # entries
BINS = 10


def calibrate(collections: dict[Path, Collection], foreign: Sequence[Path]) -> None:
    """Prints the curve fitted on all collections, and cross-validated figures for each."""
    prompts = [prompt for path in foreign for prompt in _prompts(path)]
    parts = {folder.name: _samples(folder, collections, prompts) for folder in collections}
    console = Console()
    table = Table("tested on", "curve of", "Brier score", "calibration error", "AUC")
    for name, (seen, right, weight) in parts.items():
        others = {other: part for other, part in parts.items() if other != name}
        if others:
            predicted = _fit(others).predict_proba(seen)[:, 1]
            table.add_row(name, ", ".join(others), *_figures(predicted, right, weight))
        shipped = np.array([confidence(Evidence(*row)) for row in seen])
        table.add_row(name, "as shipped", *_figures(shipped, right, weight))
    console.print(table)
    curve = _fit(parts)
    console.print(
        f"coverage {curve.coef_[0][0]:.2f}, amount {curve.coef_[0][1]:.2f}, bias {curve.intercept_[0]:.2f}"
    )


def _prompts(path: Path) -> list[str]:
    with path.open(encoding="utf-8") as file:
        found = [str(json.loads(line)["prompt"]) for line in file]
    return random.Random(1).sample(found, min(MAX_FOREIGN, len(found)))


def _samples(
    folder: Path, collections: dict[Path, Collection], prompts: Sequence[str]
) -> tuple[Any, Any, Any]:
    """Returns evidence, whether the first entry is relevant, and weights.

    The four groups weigh the same: the collection's questions and foreign ones, whole and cut to a few words.
    Each is asked of the whole collection and of a few of its entries, since small indexes are common.
    """
    collection, draw = collections[folder], random.Random(1)
    other = [text for place, held in collections.items() if place != folder for _, text in held.questions]
    foreign = draw.sample(other, min(MAX_FOREIGN, len(other))) + list(prompts)
    evidence, correct, groups = [], [], []
    for entries in (collection.entries, draw.sample(collection.entries, SMALL_INDEX)):
        index = KnowledgeIndex()
        with index.writing() as writer:
            for entry in entries:
                writer.add(entry)
            writer.commit()
        keys = {entry.key for entry in entries}
        own = [(key, text) for key, text in collection.questions if collection.relevant[key] & keys]
        for key, text in [*own, *(("", text) for text in foreign)]:
            for is_cut, query in enumerate((text, _cut(text, draw))):
                passages, found = index.rank(query, 5)
                evidence.append((found.coverage, found.amount))
                correct.append(bool(passages) and passages[0].source in collection.relevant.get(key, ()))
                groups.append(2 * is_cut + (key == ""))
    sizes = np.bincount(groups)
    return np.array(evidence), np.array(correct), np.array([1 / sizes[group] for group in groups])


def _cut(text: str, draw: random.Random) -> str:
    words = tokenize(text).words
    return " ".join(draw.sample(words, min(draw.choice((1, 2, 2, 3)), len(words))))


def _fit(parts: dict[str, tuple[Any, Any, Any]]) -> Any:
    seen, right, weight = (np.concatenate(column) for column in zip(*parts.values(), strict=True))
    return LogisticRegression(C=100, max_iter=1000).fit(seen, right, sample_weight=weight / weight.mean())


def _figures(predicted: Any, right: Any, weight: Any) -> tuple[str, str, str]:
    bins = np.clip((predicted * BINS).astype(int), 0, BINS - 1)
    share = weight / weight.sum()
    error = sum(abs(((predicted - right) * share)[bins == b].sum()) for b in range(BINS))
    brier = float(((predicted - right) ** 2 * share).sum())
    return f"{brier:.3f}", f"{error:.3f}", f"{roc_auc_score(right, predicted, sample_weight=weight):.3f}"
