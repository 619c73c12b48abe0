"""The index of knowledge: entries in, the best for a question out. On disk, or in memory alone.

The engine is tantivy, in this process: it lets go of the interpreter while it searches and commits, its files
are mapped and shared by all processes of a host, one writer at a time. What it holds can always be made anew
from config/knowledge and Postgres.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tantivy

from router.errors import RouterError
from router.knowledge.chunking import Entry
from router.knowledge.relevance import (
    BM25_K1,
    QUESTION_CHARACTERS,
    QUESTION_STEMS,
    WEIGHTS,
    Evidence,
    Views,
    confidence,
    rarity,
    views,
)
from router.knowledge.results import Passage, SearchResult

FORMAT = "1"  # of the fields below; with the engine's own it names the folder
ENGINE = version("tantivy")
WRITER_BYTES = 64_000_000
MOST_LOOKED_AT = 500_000  # entries that hold a word, summed over the words: bounds the time of a search
SPARE_HITS = 2  # of each hit that is asked for, against entries that say the same

Term = tuple[str, str]  # field, word


class IndexBroken(RouterError):  # noqa: N818 - a state of the world, read as one
    """The index on disk cannot be read or written; made anew it will be."""


NO_EVIDENCE = Evidence(0.0, 0.0)


class KnowledgeIndex:
    """Entries that can be searched, by any thread; in the folder, or in memory if there is none."""

    def __init__(self, folder: Path | None = None) -> None:
        self._schema = _schema()
        self._stemmer = _analyzer().filter(tantivy.Filter.stemmer("english")).build()
        with _told():
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
            self._index = tantivy.Index(self._schema, None if folder is None else str(folder))
            self._index.register_tokenizer("stems", self._stemmer)
            self._index.register_tokenizer("words", _analyzer().build())
            self._index.config_reader("manual")
            self._searcher = self._index.searcher()

    def __len__(self) -> int:
        return int(self._searcher.num_docs)

    def reload(self) -> None:
        """See what was committed since, here or by another process."""
        with _told():
            self._index.reload()
            self._searcher = self._index.searcher()

    def search(self, query: str, limit: int) -> SearchResult:
        """Returns the best entries for `query`, at most `limit`, no two with the same text."""
        passages, evidence = self.rank(query, limit)
        return SearchResult(passages, confidence(evidence))

    def rank(self, query: str, limit: int) -> tuple[tuple[Passage, ...], Evidence]:
        """Returns passages as `search` does, and the evidence that their confidence is computed from."""
        searcher = self._searcher
        entries = int(searcher.num_docs)
        frequencies = _affordable(self._asked(searcher, views(query[:QUESTION_CHARACTERS])))
        known = [term for term, holding in frequencies.items() if holding]
        if not known or limit < 1:
            return (), NO_EVIDENCE
        with _told():
            found = searcher.search(self._query(known), limit * SPARE_HITS + 1, count=False).hits
            passages = [_passage(score, searcher.doc(address)) for score, address in found]
        if not passages:  # all matching entries are deleted, and a merge has yet to update the frequencies
            return (), NO_EVIDENCE
        distinct = list({passage.text: passage for passage in reversed(passages)}.values())[::-1]
        return tuple(distinct[:limit]), _evidence(frequencies, entries, distinct)

    @contextmanager
    def writing(self, *, heap_bytes: int = WRITER_BYTES) -> Iterator[Writer]:
        """The right to write, which one process has at a time. What was not committed is forgotten."""
        with _told():
            inner = self._index.writer(heap_bytes, 1)
        try:
            yield Writer(inner, self._schema)
        finally:
            with _told():
                inner.rollback()
                inner.wait_merging_threads()
        self.reload()

    def task_ids(self, first: int, last: int) -> set[int]:
        """Numbers of the tasks in the index from `first` to `last`."""
        searcher = self._searcher
        addresses = [address for _, address in self._by_task(searcher, first, last, len(self) or 1)]
        return {
            int(number) for number in searcher.fast_field_values("task_id", addresses) if number is not None
        }

    def oldest_tasks(self, count: int) -> list[int]:
        """The `count` lowest numbers of tasks, in order."""
        return [int(number) for number, _ in self._by_task(self._searcher, -(2**62), 2**62, max(1, count))]

    def _by_task(self, searcher: Any, first: int, last: int, limit: int) -> list[tuple[Any, Any]]:
        numbers = tantivy.Query.range_query(self._schema, "task_id", tantivy.FieldType.Integer, first, last)
        with _told():
            return list(
                searcher.search(
                    numbers, limit, count=False, order_by_field="task_id", order=tantivy.Order.Asc
                ).hits
            )

    def _asked(self, searcher: Any, question: Views) -> dict[Term, int]:
        """What is looked for, and how many entries hold it: the rarest stems, and what goes with them."""
        stems: dict[str, list[int]] = {}
        for place, stem in enumerate(self._stemmer.analyze(question.stems)):
            stems.setdefault(stem, []).append(place)
        held = {stem: int(searcher.doc_freq("stems", stem)) for stem in stems}
        kept = sorted(stems, key=lambda stem: (held[stem] == 0, held[stem]))[:QUESTION_STEMS]
        places = {place for stem in kept for place in stems[stem][:1]}
        asked: dict[Term, int] = {("stems", stem): held[stem] for stem in kept}
        heads, pairs = question.heads, question.pairs
        others = [("heads", heads[place]) for place in places]
        others += [("pairs", pairs[place]) for place in places if place < len(pairs)]
        for field, word in others:
            asked[field, word] = int(searcher.doc_freq(field, word))
        return asked

    def _query(self, terms: Iterable[Term]) -> Any:
        query = tantivy.Query
        return query.boolean_query(
            [
                (
                    tantivy.Occur.Should,
                    query.boost_query(query.term_query(self._schema, field, word, "freq"), WEIGHTS[field]),
                )
                for field, word in terms
            ]
        )


class Writer:
    """Adds and forgets entries; nothing is seen before `commit`."""

    def __init__(self, inner: Any, schema: Any) -> None:
        self._inner = inner
        self._schema = schema

    def add(self, entry: Entry) -> None:
        """Add one entry, beside others of its key."""
        seen = views(entry.searched)
        document = tantivy.Document()
        document.add_text("key", entry.key)
        document.add_bytes("shown", json.dumps([entry.shown, entry.source]).encode())
        if entry.task_id is not None:
            document.add_integer("task_id", entry.task_id)
        document.add_text("stems", seen.stems)
        document.add_text("heads", " ".join(seen.heads))
        document.add_text("pairs", " ".join(seen.pairs))
        with _told():
            self._inner.add_document(document)

    def forget(self, key: str) -> None:
        """Take out all entries of this key that were added before."""
        with _told():
            self._inner.delete_documents_by_term("key", key)

    def forget_all(self) -> None:
        with _told():
            self._inner.delete_all_documents()

    def commit(self) -> None:
        """Let all processes see, once they reload, what was added and forgotten."""
        with _told():
            self._inner.commit()


def _schema() -> Any:
    builder = tantivy.SchemaBuilder()
    builder.add_text_field("key", tokenizer_name="raw", index_option="basic")
    builder.add_bytes_field("shown", stored=True)
    builder.add_integer_field("task_id", indexed=True, fast=True)
    builder.add_text_field("stems", tokenizer_name="stems", index_option="freq")
    for field in ("heads", "pairs"):
        builder.add_text_field(field, tokenizer_name="words", index_option="freq")
    return builder.build()


def _analyzer() -> Any:
    return tantivy.TextAnalyzerBuilder(tantivy.Tokenizer.whitespace())


def _passage(score: float, document: Any) -> Passage:
    text, source = json.loads(bytes(document.get_first("shown")))
    return Passage(text, source, float(score))


def _affordable(asked: dict[Term, int]) -> dict[Term, int]:
    """Without the commonest: what so many entries hold says little, and looking at all of them takes long."""
    kept: dict[Term, int] = {}
    left = MOST_LOOKED_AT
    for term, holding in sorted(asked.items(), key=lambda item: item[1]):
        if holding > left and left < MOST_LOOKED_AT:
            break
        kept[term] = holding
        left -= holding
    return kept


def _evidence(asked: dict[Term, int], entries: int, passages: list[Passage]) -> Evidence:
    """How much of what the question asks the best entry holds, and how far it is ahead of the next."""
    most = sum(
        WEIGHTS[field] * rarity(holding, entries) * (BM25_K1 + 1)
        for (field, _), holding in asked.items()
        if holding or field == "stems"
    )
    best = passages[0].score
    second = passages[1].score if len(passages) > 1 else 0.0
    return Evidence(best / most, (best - second) / best)


@contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except (ValueError, OSError) as error:  # all that the engine raises
        raise IndexBroken(f"the index of knowledge: {error}") from error
