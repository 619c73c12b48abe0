"""Compares search engines for knowledge: quality on real collections, and cost on synthetic ones.

First table: quality on real collections (folders with corpus.jsonl, queries.jsonl and qrels.tsv). Second
table: cost on synthetic entries, each engine in its own process. Words are drawn by Zipf's law (exponent
1.05) from 300,000, the most common ones being English stop words; lengths are log-normal with a median of 55
words. A question has six words of one entry, in its order, and two random words. One caller; the first
questions are warm-up: 50 of 350, or a tenth of those that ran within two minutes.

    pip install bm25s PyStemmer wordllama     # optional; missing engines are reported and skipped
    python -m bench.knowledge COLLECTION... [--entries 100000 1000000] [--engines router ...] [--json FILE]
    python -m bench.knowledge COLLECTION COLLECTION --calibrate --foreign PROMPTS.jsonl...

With --calibrate it fits the confidence (router/knowledge/relevance.py) on all collections, and tests on each
collection the curve fitted on the others, with its own questions and with foreign, unanswerable ones.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from bench.knowledge_rivals import ENGINES, Engine, MissingPackageError
from router.knowledge import read_collection
from router.knowledge.evaluation import Collection
from router.knowledge.relevance import STOP_WORDS

VOCABULARY = 300_000
EXPONENT = 1.05
MEDIAN_WORDS = 55
SPREAD = 0.6
QUESTIONS = 350
WARM_UP = 50
MAX_SECONDS = 120.0
DEPTH = 100
SYLLABLES = [a + b for a in "bcdfghjklmnprstvwz" for b in "aeiou"]
ENDINGS = ["", "", "s", "n", "ing", "ed", "er"]


@dataclass
class Quality:
    """Quality of one engine on one collection."""

    engine: str
    collection: str
    hit_at_1: float
    hit_at_5: float
    mrr: float


@dataclass
class Size:
    """Cost of one engine. Memory excludes the texts."""

    engine: str
    entries: int
    build_seconds: float
    disk_mb: float
    build_memory_mb: float
    p50_ms: float
    p99_ms: float
    found_share: float  # of the questions whose entry is among the first five


def _quality(name: str, folder: Path, collection: Collection) -> Quality | str:
    try:
        return measure_quality(name, folder, collection)
    except MissingPackageError as error:
        return str(error)


def measure_quality(name: str, folder: Path, collection: Collection) -> Quality:
    texts = [entry.indexed_text for entry in collection.entries]
    with tempfile.TemporaryDirectory() as scratch, ENGINES[name](Path(scratch)) as engine:
        engine.build(texts)
        ranks = []
        for key, question in collection.questions:
            found = [collection.entries[number].key for number in engine.search(question, DEPTH)]
            relevant = collection.relevant[key]
            ranks.append(next((rank for rank, entry in enumerate(found, 1) if entry in relevant), 10**9))
    return Quality(
        name,
        folder.name,
        round(float(np.mean([rank <= 1 for rank in ranks])), 3),
        round(float(np.mean([rank <= 5 for rank in ranks])), 3),
        round(float(np.mean([1 / rank if rank <= DEPTH else 0 for rank in ranks])), 3),
    )


def synthetic(entries: int) -> tuple[list[str], list[tuple[str, int]]]:
    """Returns texts, and questions with the number of the entry that each was drawn from."""
    draw = np.random.default_rng(1)
    words = _vocabulary()
    weights = np.cumsum(1 / (np.arange(1, VOCABULARY + 1) + 2.7) ** EXPONENT)
    texts: list[str] = []
    while len(texts) < entries:
        lengths = np.clip(draw.lognormal(np.log(MEDIAN_WORDS), SPREAD, 1000), 8, 400).astype(int)
        drawn = np.searchsorted(weights, draw.random(int(lengths.sum())) * weights[-1])
        texts += [" ".join(words[n] for n in part) for part in np.split(drawn, np.cumsum(lengths)[:-1])]
    del texts[entries:]
    questions = []
    for number in draw.integers(0, entries, QUESTIONS):
        held = texts[number].split()
        kept = sorted(draw.choice(len(held), min(6, len(held)), replace=False))
        more = np.searchsorted(weights, draw.random(2) * weights[-1])
        questions.append((" ".join([*(held[n] for n in kept), *(words[n] for n in more)]), int(number)))
    return texts, questions


def _vocabulary() -> list[str]:
    """Returns words by frequency: English stop words, then made-up ones that get longer."""
    words = sorted(STOP_WORDS)
    for rank in range(len(words), VOCABULARY):
        own = random.Random(rank)
        length = 2 + max(0, len(str(rank)) - 3)
        words.append("".join(own.choice(SYLLABLES) for _ in range(length)) + own.choice(ENDINGS))
    return words


def measure_size(name: str, entries: int) -> Size:
    texts, questions = synthetic(entries)
    gc.collect()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory() as scratch, ENGINES[name](Path(scratch)) as engine:
        began = time.perf_counter()
        engine.build(texts)
        build = time.perf_counter() - began
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        took, found = _timed(engine, questions)
        return Size(
            name, entries, round(build, 1), round(engine.disk_bytes() / 1e6, 1), round(memory / 1e3, 1),
            round(float(np.median(took)), 2), round(float(np.percentile(took, 99)), 2),
            round(float(np.mean(found)), 3),
        )  # fmt: skip


def _timed(engine: Engine, questions: Sequence[tuple[str, int]]) -> tuple[list[float], list[bool]]:
    took, found = [], []
    began = time.perf_counter()
    for question, number in questions:
        started = time.perf_counter()
        numbers = engine.search(question, 5)
        took.append((time.perf_counter() - started) * 1e3)
        found.append(number in numbers)
        if time.perf_counter() - began > MAX_SECONDS:
            break
    warm_up = min(WARM_UP, len(took) // 10)
    return took[warm_up:], found[warm_up:]


def size_in_child(name: str, entries: int) -> Size | str:
    child = subprocess.run(
        [sys.executable, "-m", "bench.knowledge", "--one", name, "--entries", str(entries)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if child.returncode:
        return child.stderr.strip().splitlines()[-1]
    return Size(**json.loads(child.stdout))


def print_quality(console: Console, found: Sequence[Quality]) -> None:
    table = Table("engine", "collection", "hit@1", "hit@5", "MRR", title="Quality")
    for row in found:
        table.add_row(
            row.engine, row.collection, f"{row.hit_at_1:.3f}", f"{row.hit_at_5:.3f}", f"{row.mrr:.3f}"
        )
    console.print(table)


def print_sizes(console: Console, found: Sequence[Size]) -> None:
    table = Table(
        "engine", "entries", "build s", "disk MB", "build memory MB", "p50 ms", "p99 ms", "found in 5"
    )
    for row in found:
        table.add_row(
            row.engine, f"{row.entries:,}", f"{row.build_seconds:.1f}", f"{row.disk_mb:,.0f}",
            f"{row.build_memory_mb:,.0f}", f"{row.p50_ms:.2f}", f"{row.p99_ms:.2f}", f"{row.found_share:.3f}",
        )  # fmt: skip
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("collections", nargs="*", type=Path)
    parser.add_argument("--entries", nargs="*", type=int, default=[])
    parser.add_argument("--engines", nargs="*", choices=sorted(ENGINES), default=sorted(ENGINES))
    parser.add_argument("--calibrate", action="store_true")
    parser.add_argument("--foreign", nargs="*", type=Path, default=[])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", choices=sorted(ENGINES), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.one:
        print(json.dumps(asdict(measure_size(chosen.one, chosen.entries[0]))))
        return
    collections = {folder: read_collection(folder) for folder in chosen.collections}
    if chosen.calibrate:
        from bench.knowledge_confidence import calibrate  # noqa: PLC0415 - scikit-learn takes a second

        calibrate(collections, chosen.foreign)
        return
    console = Console()
    report = _measured(console, collections, chosen.engines, chosen.entries)
    if chosen.json:
        chosen.json.write_text(json.dumps(report, indent=2))


def _measured(
    console: Console, collections: dict[Path, Collection], engines: Sequence[str], entries: Sequence[int]
) -> dict[str, Any]:
    quality: list[Quality] = []
    for name in engines:
        for folder, collection in collections.items():
            measured = _quality(name, folder, collection)
            if isinstance(measured, str):
                console.print(f"{name} skipped: {measured}")
            else:
                quality.append(measured)
    if quality:
        print_quality(console, quality)
    sizes: list[Size] = []
    for count in entries:
        for name in engines:
            size = size_in_child(name, count)
            if isinstance(size, str):
                console.print(f"{name} skipped: {size}")
            else:
                sizes.append(size)
                console.print(asdict(size))
    if sizes:
        print_sizes(console, sizes)
    return {"quality": [asdict(row) for row in quality], "sizes": [asdict(row) for row in sizes]}


if __name__ == "__main__":
    main()
