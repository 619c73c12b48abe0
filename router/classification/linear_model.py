"""The trained model: logistic regression over TF-IDF of words and character n-grams, shapes and rules.

TF-IDF is computed here, since it needs only numpy: scikit-learn is imported for training alone, which takes a
second of processor time, like the import. Trained models are therefore cached on disk, as arrays without
pickle, in files named after everything that training depends on.
"""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix, hstack

from router.classification.features import (
    WORD_COLUMNS,
    gram_counts,
    shapes,
    word_column,
    word_counts,
    words_of,
)
from router.files import replacing

SHAPE_SCALE = 0.3
RULE_SCALE = 0.3
REGULARIZATION = 0.1
MAX_RARE = 2  # columns of at most as many examples are not used ...
EXAMPLES_PER_RARE = 4000  # ... but with few examples, only those of one example
CACHED_MODELS = 8  # the most recently used

Numbers = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Features:
    """Prompts in the forms that features are computed from, in the same order."""

    prompts: Sequence[str]  # shortened
    texts: Sequence[str]  # normalized
    matches: Sequence[Sequence[float]]  # per prompt, a number for each rule


@dataclass(frozen=True)
class LinearModel:
    """Parameters of the model. Columns are words, n-grams, shapes and rules, in this order."""

    word_weights: Numbers  # inverse document frequency per column
    gram_weights: Numbers  # the same
    coefficients: Numbers  # (columns, categories)
    intercepts: Numbers  # (categories,)

    @classmethod
    def train(
        cls, examples: Features, labels: Sequence[int], weights: Sequence[float] | Numbers, categories: int
    ) -> LinearModel:
        """Trains on examples, each with the number of its category and a sample weight.

        One regression per category: liblinear takes a fifth of the time of a multinomial one, and is as
        accurate.
        """
        from sklearn.linear_model import LogisticRegression  # noqa: PLC0415 - it takes a second
        from threadpoolctl import threadpool_limits  # noqa: PLC0415 - scikit-learn brings it

        words, grams = word_counts(examples.texts), gram_counts(examples.texts)
        word_weights, gram_weights = _inverse_frequency(words), _inverse_frequency(grams)
        columns = _columns(examples, _tfidf(words, word_weights), _tfidf(grams, gram_weights))
        coefficients, intercepts = np.zeros((columns.shape[1], categories)), np.zeros(categories)
        rare = 1 + min(MAX_RARE - 1, len(labels) // EXAMPLES_PER_RARE)
        used = np.flatnonzero(np.asarray(columns.getnnz(axis=0)) > rare)
        seen, truth = columns[:, used], np.asarray(labels)
        for category in range(categories if categories > 1 else 0):
            model = LogisticRegression(
                C=1 / REGULARIZATION, solver="liblinear", dual=True, tol=0.02, max_iter=200, random_state=0
            )
            with threadpool_limits(1):  # several threads slow each other down on a busy host
                model.fit(seen, truth == category, sample_weight=weights)
            coefficients[used, category] = model.coef_[0]
            intercepts[category] = model.intercept_[0]
        return cls(word_weights, gram_weights, coefficients, intercepts)

    def scores(self, features: Features) -> Numbers:
        """Returns the log-odds of each category against the rest, shape (prompts, categories)."""
        words = _tfidf(word_counts(features.texts), self.word_weights)
        grams = _tfidf(gram_counts(features.texts), self.gram_weights)
        scores: Numbers = _columns(features, words, grams) @ self.coefficients + self.intercepts
        return scores

    def word_contributions(self, text: str, category: int) -> dict[str, float]:
        """Returns how much each word of a normalized text adds to the category, relative to the others."""
        coefficients = self.coefficients[:WORD_COLUMNS]
        relative = coefficients[:, category] - coefficients.mean(axis=1)
        added = _tfidf(word_counts([text]), self.word_weights).multiply(relative).tocsr()
        return {word: float(added[0, word_column(word)]) for word in dict.fromkeys(words_of(text))}


def load_or_train(folder: Path, name: str, train: Callable[[], LinearModel]) -> LinearModel:
    """Loads the model `name` from the cache `folder`, or trains and stores it.

    An unreadable file is replaced. In a folder that cannot be written nothing is stored.
    """
    path = folder / f"{name}.npz"
    with suppress(OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            loaded = LinearModel(**{field.name: arrays[field.name] for field in fields(LinearModel)})
        with suppress(OSError):
            os.utime(path)
        return loaded
    trained = train()
    with suppress(OSError):
        _store(trained, path)
    return trained


def _store(model: LinearModel, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, mode=0o644) as file:
        np.savez_compressed(file, **{field.name: getattr(model, field.name) for field in fields(model)})
    oldest_first = sorted(path.parent.glob("*.npz"), key=lambda file: file.stat().st_mtime)
    for old in oldest_first[:-CACHED_MODELS]:
        old.unlink(missing_ok=True)


def _columns(features: Features, words: csr_matrix, grams: csr_matrix) -> csr_matrix:
    rules = np.array(features.matches, dtype=np.float64).reshape(len(features.texts), -1)
    shape = shapes(features.prompts, features.texts)
    return hstack(
        [words, grams, csr_matrix(shape * SHAPE_SCALE), csr_matrix(rules * RULE_SCALE)], format="csr"
    )


def _inverse_frequency(counts: csr_matrix) -> Numbers:
    seen = np.asarray(counts.getnnz(axis=0))
    weights: Numbers = np.where(seen > 0, np.log((1 + counts.shape[0]) / (1 + seen)) + 1, 0.0)
    return weights


def _tfidf(counts: csr_matrix, weights: Numbers) -> csr_matrix:
    """Returns sublinear TF-IDF with rows of length 1."""
    scaled = counts.copy()
    scaled.data = (1 + np.log(counts.data)) * weights[counts.indices]
    rows = np.repeat(np.arange(counts.shape[0]), np.diff(counts.indptr))
    norms = np.sqrt(np.bincount(rows, scaled.data**2, minlength=counts.shape[0]))
    scaled.data /= np.where(norms > 0, norms, 1)[rows]
    return scaled
