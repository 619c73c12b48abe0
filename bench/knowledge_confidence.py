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

from router.knowledge.chunking import Entry
from router.knowledge.evaluation import Collection
from router.knowledge.index import KnowledgeIndex
from router.knowledge.relevance import Evidence, confidence

MAX_FOREIGN = 400
BINS = 10


def calibrate(collections: dict[Path, Collection], foreign: Sequence[Path]) -> None:
    """Prints the curve fitted on all collections, and cross-validated figures for each."""
    prompts = [prompt for path in foreign for prompt in _prompts(path)]
    parts = {folder.name: _evidence(folder, collections, prompts) for folder in collections}
    console = Console()
    table = Table("tested on", "curve of", "Brier score", "calibration error", "AUC")
    for name, (seen, right, _) in parts.items():
        others = {other: part for other, part in parts.items() if other != name}
        if others:
            predicted = _fit(others).predict_proba(seen)[:, 1]
            table.add_row(name, ", ".join(others), *_figures(predicted, right))
        shipped = np.array([confidence(Evidence(*row)) for row in seen])
        table.add_row(name, "as shipped", *_figures(shipped, right))
    console.print(table)
    curve = _fit(parts)
    console.print(
        f"coverage {curve.coef_[0][0]:.2f}, lead {curve.coef_[0][1]:.2f}, bias {curve.intercept_[0]:.2f}"
    )


def _prompts(path: Path) -> list[str]:
    with path.open(encoding="utf-8") as file:
        found = [str(json.loads(line)["prompt"]) for line in file]
    return random.Random(1).sample(found, min(MAX_FOREIGN, len(found)))


def _evidence(
    folder: Path, collections: dict[Path, Collection], prompts: Sequence[str]
) -> tuple[Any, Any, Any]:
    """Returns evidence, whether the first entry is relevant, and weights (own and foreign alike)."""
    collection = collections[folder]
    index = KnowledgeIndex()
    with index.writing() as writer:
        for entry in collection.entries:
            writer.add(Entry(entry.key, entry.key, entry.title, entry.text))
        writer.commit()
    foreign = [text for other, held in collections.items() if other != folder for _, text in held.questions]
    foreign = random.Random(1).sample(foreign, min(MAX_FOREIGN, len(foreign))) + list(prompts)
    evidence, correct = [], []
    for key, text in [*collection.questions, *(("", text) for text in foreign)]:
        passages, found = index.rank(text, 5)
        evidence.append((found.coverage, found.lead))
        relevant = collection.relevant.get(key, frozenset())
        correct.append(bool(passages) and passages[0].source in relevant)
    own = len(collection.questions)
    weight = np.array([1 / own] * own + [1 / max(1, len(foreign))] * len(foreign))
    return np.array(evidence), np.array(correct), weight


def _fit(parts: dict[str, tuple[Any, Any, Any]]) -> Any:
    seen, right, weight = (np.concatenate(column) for column in zip(*parts.values(), strict=True))
    return LogisticRegression(C=100, max_iter=1000).fit(seen, right, sample_weight=weight / weight.mean())


def _figures(predicted: Any, right: Any) -> tuple[str, str, str]:
    bins = np.clip((predicted * BINS).astype(int), 0, BINS - 1)
    error = sum(
        abs(predicted[bins == b].mean() - right[bins == b].mean()) * (bins == b).mean()
        for b in range(BINS)
        if (bins == b).any()
    )
    brier = float(((predicted - right) ** 2).mean())
    return f"{brier:.3f}", f"{error:.3f}", f"{roc_auc_score(right, predicted):.3f}"
