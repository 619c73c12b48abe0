"""Evaluates retrieval on questions with known relevant documents: hit@1, hit@5, MRR and times."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from router.errors import InputError, echoed
from router.files import json_lines
from router.knowledge.chunking import Entry
from router.knowledge.index import KnowledgeIndex

MAX_RANK = 100  # a relevant document further down counts as not found
MILLISECONDS = 1000.0


@dataclass(frozen=True, slots=True)
class Collection:
    """Documents, questions, and the relevant documents of each question."""

    entries: tuple[Entry, ...]
    questions: tuple[tuple[str, str], ...]  # id, text
    relevant: dict[str, frozenset[str]]  # id of the question -> keys of entries


@dataclass(frozen=True, slots=True)
class RetrievalReport:
    """Retrieval quality and times.

    `hit_at_5` is the share of questions with a relevant document among the first five; `mrr` is the mean
    reciprocal rank of the first relevant document, to a depth of 100. Times are per question.
    """

    documents: int
    queries: int
    hit_at_1: float
    hit_at_5: float
    mrr: float
    milliseconds_p50: float
    milliseconds_p99: float
    build_seconds: float


def read_collection(folder: Path) -> Collection:
    """Reads corpus.jsonl, queries.jsonl and qrels.tsv (the BEIR format).

    Raises InputError with file and line.
    """
    entries = tuple(
        Entry(key, key, str(row.get("title") or "").replace("_", " "), row["text"])
        for key, row in _texts(folder / "corpus.jsonl")
    )
    questions = tuple((key, row["text"]) for key, row in _texts(folder / "queries.jsonl"))
    relevant = _relevant(folder / "qrels.tsv", {entry.key for entry in entries})
    judged = tuple(question for question in questions if relevant.get(question[0]))
    if not judged:
        raise InputError(f"{folder / 'qrels.tsv'} names no relevant document of any query.")
    return Collection(entries, judged, relevant)


def evaluate_retrieval(collection: Collection) -> RetrievalReport:
    """Indexes the collection in memory and searches for every question once."""
    began = time.perf_counter()
    index = KnowledgeIndex()
    with index.writing() as writer:
        for entry in collection.entries:
            writer.add(entry)
        writer.commit()
    build_seconds = time.perf_counter() - began
    ranks: list[float] = []
    took: list[float] = []
    for key, text in collection.questions:
        started = time.perf_counter()
        found = [passage.source for passage in index.search(text, MAX_RANK).passages]
        took.append((time.perf_counter() - started) * MILLISECONDS)
        ranks.append(_first_rank(found, collection.relevant[key]))
    return RetrievalReport(
        documents=len(collection.entries),
        queries=len(ranks),
        hit_at_1=round(fmean(rank <= 1 for rank in ranks), 4),
        hit_at_5=round(fmean(rank <= 5 for rank in ranks), 4),  # noqa: PLR2004 - as its name says
        mrr=round(fmean(1 / rank for rank in ranks), 4),
        milliseconds_p50=_quantile(took, 0.5),
        milliseconds_p99=_quantile(took, 0.99),
        build_seconds=round(build_seconds, 3),
    )


def _first_rank(found: Sequence[str], relevant: frozenset[str]) -> float:
    """Rank of the first relevant document, from 1; infinite if none was found."""
    return next((rank for rank, key in enumerate(found, 1) if key in relevant), float("inf"))


def _quantile(values: Sequence[float], share: float) -> float:
    return round(sorted(values)[min(len(values) - 1, int(share * len(values)))], 3)


def _texts(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for place, row in json_lines(path, error=InputError):
        if "_id" not in row or not isinstance(row.get("text"), str):
            raise InputError(f'{place}: must have an "_id" and a "text" that is a string.')
        yield str(row["_id"]), row


def _relevant(path: Path, documents: set[str]) -> dict[str, frozenset[str]]:
    found: defaultdict[str, set[str]] = defaultdict(set)
    for number, line in enumerate(_lines(path), 1):
        cells = line.rstrip("\r").split("\t")
        if not line.strip() or (number == 1 and not _is_number(cells[-1])):
            continue  # the header
        if len(cells) != 3 or not _is_number(cells[2]):  # noqa: PLR2004 - question, document, relevance
            raise InputError(f"{path}, line {number}: must be query, document and number, tab-separated.")
        if cells[1] not in documents:
            raise InputError(f"{path}, line {number}: document {echoed(cells[1])} is not in corpus.jsonl.")
        if float(cells[2]) > 0:
            found[cells[0]].add(cells[1])
    return {question: frozenset(keys) for question, keys in found.items()}


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as UTF-8 text: {error}.") from error


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
