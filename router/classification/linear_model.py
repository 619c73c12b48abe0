"""What a categoriser learned, as numbers: from prompts and their features to a score for each category.

A logistic regression over TF-IDF of words and of character n-grams, the prompt's shape and the rules that
matched. Learning takes a second of processor time and scikit-learn another to import, so what came of it is
kept in a folder of what can be made anew: arrays without pickle, named after all that they depend on.
"""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

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

SHAPE_SCALE = 0.3
RULE_SCALE = 0.35
REGULARISATION = 3.0
CACHED_MODELS = 8  # those that were used last

Numbers = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Features:
    """Prompts as the classifier sees them, in order. `matches`: of each prompt a number for each rule."""

    prompts: Sequence[str]  # cut
    texts: Sequence[str]  # normal
    matches: Sequence[Sequence[float]]


@dataclass(frozen=True)
class LinearModel:
    """Inverse frequencies of words and n-grams; a coefficient for each column and category, and intercepts.

    Columns are words, n-grams, shapes and rules, in this order.
    """

    word_weights: Numbers
    gram_weights: Numbers
    coefficients: Numbers
    intercepts: Numbers

    @classmethod
    def learn(
        cls, examples: Features, labels: Sequence[int], weights: Sequence[float] | Numbers, categories: int
    ) -> LinearModel:
        """From examples with their category's number and weight each."""
        from sklearn.linear_model import LogisticRegression  # noqa: PLC0415 - it takes a second
        from threadpoolctl import threadpool_limits  # noqa: PLC0415 - scikit-learn brings it

        words, grams = word_counts(examples.texts), gram_counts(examples.texts)
        word_weights, gram_weights = _inverse_frequency(words), _inverse_frequency(grams)
        columns = _columns(examples, _tfidf(words, word_weights), _tfidf(grams, gram_weights))
        coefficients, intercepts = np.zeros((columns.shape[1], categories)), np.zeros(categories)
        if categories > 1:
            used = np.flatnonzero(np.asarray(columns.getnnz(axis=0)) > 1)
            model = LogisticRegression(C=REGULARISATION, max_iter=80, tol=5e-4)
            with threadpool_limits(1):  # more would be in each other's way on a busy machine
                model.fit(columns[:, used], labels, sample_weight=weights)
            coefficients[used] = _of_each_category(model.coef_)
            intercepts = _of_each_category(model.intercept_[:, None])[0]
        return cls(word_weights, gram_weights, coefficients, intercepts)

    def scores(self, asked: Features) -> Numbers:
        """A row a prompt, a column a category."""
        words = _tfidf(word_counts(asked.texts), self.word_weights)
        grams = _tfidf(gram_counts(asked.texts), self.gram_weights)
        scores: Numbers = _columns(asked, words, grams) @ self.coefficients + self.intercepts
        return scores

    def telling_words(self, text: str, category: int) -> dict[str, float]:
        """How much each word of a normal text spoke for the category (above 0) or against it (below)."""
        coefficients = self.coefficients[:WORD_COLUMNS]
        own = coefficients[:, category] - coefficients.mean(axis=1)
        told = _tfidf(word_counts([text]), self.word_weights).multiply(own).tocsr()
        return {word: float(told[0, word_column(word)]) for word in dict.fromkeys(words_of(text))}


def kept(folder: Path, name: str, learn: Callable[[], LinearModel]) -> LinearModel:
    """What was learned under this name and kept in `folder`; else what `learn` gives, kept from now on.

    A file that cannot be read is learned anew; a folder that cannot be written keeps nothing.
    """
    path = folder / f"{name}.npz"
    with suppress(OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            found = LinearModel(**{field.name: arrays[field.name] for field in fields(LinearModel)})
        with suppress(OSError):
            os.utime(path)
        return found
    made = learn()
    with suppress(OSError):
        _keep(made, path)
    return made


def _keep(made: LinearModel, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(f".{os.getpid()}")
    with fresh.open("wb") as file:
        np.savez_compressed(file, **{field.name: getattr(made, field.name) for field in fields(made)})
    fresh.replace(path)
    oldest_first = sorted(path.parent.glob("*.npz"), key=lambda file: file.stat().st_mtime)
    for old in oldest_first[:-CACHED_MODELS]:
        old.unlink(missing_ok=True)


def _columns(of: Features, words: csr_matrix, grams: csr_matrix) -> csr_matrix:
    rules = np.array(of.matches, dtype=np.float64).reshape(len(of.texts), -1)
    return hstack(
        [
            words,
            grams,
            csr_matrix(shapes(of.prompts, of.texts) * SHAPE_SCALE),
            csr_matrix(rules * RULE_SCALE),
        ],
        format="csr",
    )


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
