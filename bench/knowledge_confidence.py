"""Fits and tests the curve that turns evidence into confidence (router/relevance.py)."""

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

FOREIGN_OF_EACH = 400
BINS = 10


def calibrate(collections: dict[Path, Collection], foreign: Sequence[Path]) -> None:
    """Print the curve of all collections, and how those fitted on the others do on each."""
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
    return random.Random(1).sample(found, min(FOREIGN_OF_EACH, len(found)))


def _evidence(
    folder: Path, collections: dict[Path, Collection], prompts: Sequence[str]
) -> tuple[Any, Any, Any]:
    """Evidence, whether the first entry was right, and weights: own and foreign questions count alike."""
    collection = collections[folder]
    index = KnowledgeIndex()
    with index.writing() as writer:
        for entry in collection.entries:
            writer.add(Entry(entry.key, entry.key, entry.title, entry.text))
        writer.commit()
    strange = [text for other, held in collections.items() if other != folder for _, text in held.questions]
    strange = random.Random(1).sample(strange, min(FOREIGN_OF_EACH, len(strange))) + list(prompts)
    seen, right = [], []
    for key, text in [*collection.questions, *(("", text) for text in strange)]:
        passages, evidence = index.rank(text, 5)
        seen.append((evidence.coverage, evidence.lead))
        good = collection.relevant.get(key, frozenset())
        right.append(bool(passages) and passages[0].source in good)
    own = len(collection.questions)
    weight = np.array([1 / own] * own + [1 / max(1, len(strange))] * len(strange))
    return np.array(seen), np.array(right), weight


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
