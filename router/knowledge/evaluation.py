"""How well knowledge is found: questions with known answers, asked of the index, and counted."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from router.errors import InputError
from router.knowledge.chunking import Entry
from router.knowledge.index import KnowledgeIndex

DEPTH = 100  # beyond it a finding counts nothing
MILLISECONDS = 1000.0


@dataclass(frozen=True, slots=True)
class Collection:
    """Documents, questions, and which documents are relevant to which question."""

    entries: tuple[Entry, ...]
    questions: tuple[tuple[str, str], ...]  # id, text
    relevant: dict[str, frozenset[str]]


@dataclass(frozen=True, slots=True)
class RetrievalReport:
    """What was counted. `hit_at_5`: a relevant document is among the first five; `mrr` to a depth of 100."""

    documents: int
    queries: int
    hit_at_1: float
    hit_at_5: float
    mrr: float
    milliseconds_p50: float
    milliseconds_p99: float
    build_seconds: float


def read_collection(folder: Path) -> Collection:
    """Read corpus.jsonl, queries.jsonl and qrels.tsv. InputError names file and line."""
    entries = tuple(
        Entry(key, key, str(row.get("title") or "").replace("_", " "), row["text"])
        for key, row in _texts(folder / "corpus.jsonl")
    )
    questions = tuple((key, row["text"]) for key, row in _texts(folder / "queries.jsonl"))
    relevant = _relevant(folder / "qrels.tsv", {entry.key for entry in entries})
    judged = tuple(question for question in questions if relevant.get(question[0]))
    if not judged:
        raise InputError(
            f"{folder / 'qrels.tsv'} names no relevant document for any question of queries.jsonl."
        )
    return Collection(entries, judged, relevant)


def evaluate_retrieval(collection: Collection) -> RetrievalReport:
    """Build an index of the collection in memory and ask it every question once."""
    began = time.perf_counter()
    index = KnowledgeIndex()
    with index.writing() as writer:
        for entry in collection.entries:
            writer.add(entry)
        writer.commit()
    build_seconds = time.perf_counter() - began
    places: list[int | None] = []
    took: list[float] = []
    for key, text in collection.questions:
        asked = time.perf_counter()
        found = [passage.source for passage in index.search(text, DEPTH).passages]
        took.append((time.perf_counter() - asked) * MILLISECONDS)
        places.append(_first_place(found, collection.relevant[key]))
    return RetrievalReport(
        documents=len(collection.entries),
        queries=len(places),
        hit_at_1=_share(places, 1),
        hit_at_5=_share(places, 5),
        mrr=round(sum(1 / place for place in places if place) / len(places), 4),
        milliseconds_p50=_quantile(took, 0.5),
        milliseconds_p99=_quantile(took, 0.99),
        build_seconds=round(build_seconds, 3),
    )


def _texts(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(f"{path}, line {number} is not JSON: {error}.") from error
        if not isinstance(row, dict) or "_id" not in row or not isinstance(row.get("text"), str):
            raise InputError(f'{path}, line {number} must be an object with "_id" and a "text".')
        yield str(row["_id"]), row


def _relevant(path: Path, documents: set[str]) -> dict[str, frozenset[str]]:
    found: defaultdict[str, set[str]] = defaultdict(set)
    for number, line in enumerate(_lines(path), 1):
        cells = line.rstrip("\r").split("\t")
        if not line.strip() or (number == 1 and not _is_number(cells[-1])):
            continue  # the heading
        if len(cells) != 3 or not _is_number(cells[2]):  # noqa: PLR2004 - question, document, relevance
            raise InputError(f"{path}, line {number} must hold question, document and a number, by tabs.")
        if cells[1] not in documents:
            raise InputError(f"{path}, line {number}: document {cells[1]!r} is not in corpus.jsonl.")
        if float(cells[2]) > 0:
            found[cells[0]].add(cells[1])
    return {question: frozenset(keys) for question, keys in found.items()}


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError as error:
        raise InputError(
            f"{path} does not exist. The folder must hold corpus.jsonl, queries.jsonl and qrels.tsv."
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as UTF-8 text: {error}.") from error


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _first_place(found: Sequence[str], relevant: frozenset[str]) -> int | None:
    return next((place for place, key in enumerate(found, 1) if key in relevant), None)


def _share(places: Sequence[int | None], depth: int) -> float:
    return round(sum(place is not None and place <= depth for place in places) / len(places), 4)


def _quantile(values: Sequence[float], share: float) -> float:
    return round(sorted(values)[min(len(values) - 1, int(share * len(values)))], 3)
