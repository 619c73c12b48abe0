"""Full-text index of entries, on disk or in memory.

The engine is tantivy, in process: it releases the GIL while it searches and commits, and its memory-mapped
files are shared by all processes of a host, one of which writes at a time. The index can always be rebuilt
from config/knowledge and Postgres.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tantivy

from router.errors import RouterError
from router.knowledge.chunking import Entry
from router.knowledge.relevance import (
    BM25_K1,
    MAX_QUERY_CHARACTERS,
    MAX_QUERY_STEMS,
    SMALL_TALK,
    SMALL_TALK_SHARE,
    WEIGHTS,
    Evidence,
    Tokens,
    amount_of,
    confidence,
    inverse_document_frequency,
    tokenize,
)
from router.knowledge.results import Passage, SearchResult

FORMAT = "2"  # of the schema; part of the folder's name, like the engine's version
ENGINE = version("tantivy")
WRITER_BYTES = 64_000_000
MAX_POSTINGS = 500_000  # entries that contain a term, summed over the terms of a query: bounds its time
HITS_PER_PASSAGE = 2  # fetched, since entries with equal texts are merged
MAX_COUNTED = 5_000  # entries with a term: of more frequent ones, those that a search may see are estimated
EVERYBODY = 0  # owner of entries that every search sees
OWNER_BITS = 62
OTHER_TASK = "a solved task"  # source of a task of another client

Term = tuple[str, str]  # field, word


class KnowledgeIndexError(RouterError):
    """The index on disk cannot be read or written; it is rebuilt by the next run of the indexer."""


class KnowledgeIndex:
    """Searchable entries in a folder, or in memory without one. Thread-safe."""

    def __init__(self, folder: Path | None = None) -> None:
        self._schema = _schema()
        self._stemmer = _analyzer().filter(tantivy.Filter.stemmer("english")).build()
        self._small_talk = frozenset(self._stemmer.analyze(" ".join(SMALL_TALK)))
        with _engine_errors():
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
            self._index = tantivy.Index(self._schema, None if folder is None else str(folder))
            self._index.register_tokenizer("stems", self._stemmer)
            self._index.register_tokenizer("words", _analyzer().build())
            self._index.config_reader("manual")
            self._searcher = self._index.searcher()
        self._visible: dict[tuple[int, ...], int] = {}

    def __len__(self) -> int:
        return int(self._searcher.num_docs)

    def reload(self) -> None:
        """Makes later searches see all commits so far, also those of other processes."""
        with _engine_errors():
            self._index.reload()
            self._searcher, self._visible = self._index.searcher(), {}

    def search(self, query: str, limit: int, client: str = "", *, of_all: bool = False) -> SearchResult:
        """Returns the best entries for `query`, at most `limit`, no two with the same text.

        Sees everybody's entries and the tasks of `client`, with `of_all` those of all clients. Frequencies
        are those among what it sees, so that confidence tells nothing about tasks of others.
        """
        passages, evidence = self.rank(query, limit, client, of_all=of_all)
        return SearchResult(passages, confidence(evidence))

    def rank(
        self, query: str, limit: int, client: str = "", *, of_all: bool = False
    ) -> tuple[tuple[Passage, ...], Evidence]:
        """Returns passages as `search` does, and the evidence that their confidence is computed from."""
        searcher = self._searcher
        counts = self._counts(searcher, tokenize(query[:MAX_QUERY_CHARACTERS]))
        everywhere = without_common_terms({term: int(searcher.doc_freq(*term)) for term in counts})
        weights = {term: WEIGHTS[term[0]] * counts[term] for term in everywhere}
        if not any(everywhere.values()) or limit < 1:
            return (), Evidence()
        with _engine_errors():
            scope = _Scope(self._schema, searcher, None if of_all else (EVERYBODY, owner_of(client)))
            entries = self._visible_entries(scope)
            frequencies = scope.frequencies(everywhere, entries)
            terms = self._query(_boosts(weights, everywhere, frequencies, int(searcher.num_docs), entries))
            hits = searcher.search(scope.of(terms), limit * HITS_PER_PASSAGE + 1, count=False).hits
            passages = [_passage(score, searcher.doc(address), client) for score, address in hits]
        if not passages:  # every match is deleted, and document frequencies follow at the next merge
            return (), Evidence()
        distinct = list({passage.text: passage for passage in reversed(passages)}.values())[::-1]
        return tuple(distinct[:limit]), self._evidence(frequencies, weights, entries, distinct)

    def _visible_entries(self, scope: _Scope) -> int:
        if scope.owners is None:
            return len(self)
        if scope.owners not in self._visible:
            self._visible[scope.owners] = scope.entries()
        return self._visible[scope.owners]

    @contextmanager
    def writing(self, *, heap_bytes: int = WRITER_BYTES) -> Iterator[Writer]:
        """Opens the only writer, and discards what it did not commit.

        Raises KnowledgeIndexError if another process writes.
        """
        with _engine_errors():
            inner = self._index.writer(heap_bytes, 1)
        try:
            yield Writer(inner, self._schema)
        finally:
            with _engine_errors():
                inner.rollback()
                inner.wait_merging_threads()
        self.reload()

    def task_owners(self, first: int, last: int) -> dict[int, int]:
        """Returns id -> owner of the indexed tasks from `first` to `last`, both inclusive."""
        searcher = self._searcher
        addresses = [address for _, address in self._by_task(searcher, first, last, len(self) or 1)]
        ids, owners = (searcher.fast_field_values(field, addresses) for field in ("task_id", "owner"))
        return {int(found or 0): int(owner or 0) for found, owner in zip(ids, owners, strict=True)}

    def oldest_tasks(self, count: int) -> list[int]:
        """Returns the `count` lowest ids of indexed tasks, ascending."""
        return [int(number) for number, _ in self._by_task(self._searcher, -(2**62), 2**62, max(1, count))]

    def _by_task(self, searcher: Any, first: int, last: int, limit: int) -> list[tuple[Any, Any]]:
        in_range = tantivy.Query.range_query(self._schema, "task_id", tantivy.FieldType.Integer, first, last)
        order = {"order_by_field": "task_id", "order": tantivy.Order.Asc}
        with _engine_errors():
            return list(searcher.search(in_range, limit, count=False, **order).hits)

    def _counts(self, searcher: Any, query: Tokens) -> Counter[Term]:
        """Returns how often the query contains each of its most telling stems, and their heads and pairs."""
        positions: defaultdict[str, list[int]] = defaultdict(list)
        for position, stem in enumerate(self._stemmer.analyze(query.stems)):
            positions[stem].append(position)
        entries = int(searcher.num_docs)
        weight = {
            stem: len(places) * inverse_document_frequency(matching, entries)
            for stem, places in positions.items()
            if (matching := int(searcher.doc_freq("stems", stem)))
        }
        chosen = sorted(positions, key=lambda stem: -weight.get(stem, 0.0))[:MAX_QUERY_STEMS]
        heads, pairs = query.heads, query.pairs
        counts: Counter[Term] = Counter()
        for stem in chosen:
            for position in positions[stem]:
                counts["stems", stem] += 1
                counts["heads", heads[position]] += 1
                if position < len(pairs):
                    counts["pairs", pairs[position]] += 1
        return counts

    def _query(self, weights: Mapping[Term, float]) -> Any:
        query = tantivy.Query
        weighted = (
            query.boost_query(query.term_query(self._schema, field, word, "freq"), weight)
            for (field, word), weight in weights.items()
        )
        return query.boolean_query([(tantivy.Occur.Should, term) for term in weighted])

    def _evidence(
        self,
        frequencies: Mapping[Term, int],
        weights: Mapping[Term, float],
        entries: int,
        passages: Sequence[Passage],
    ) -> Evidence:
        idf = {term: inverse_document_frequency(matching, entries) for term, matching in frequencies.items()}
        highest_possible = sum(
            weights[term] * idf[term] * (BM25_K1 + 1)
            for term, matching in frequencies.items()
            if matching or term[0] == "stems"
        )
        best = passages[0]
        stems = set(self._stemmer.analyze(tokenize(best.text).stems))
        information = sum(
            idf[field, stem] * (SMALL_TALK_SHARE if stem in self._small_talk else 1.0)
            for field, stem in frequencies
            if field == "stems" and stem in stems
        )
        return Evidence(best.score / highest_possible, amount_of(information, entries))


class _Scope:
    """Entries that a search may see: those of `owners`, or all of them."""

    def __init__(self, schema: Any, searcher: Any, owners: tuple[int, ...] | None) -> None:
        self.owners = owners
        self._schema = schema
        self._searcher = searcher
        self._filter = None
        if owners is not None:
            of_owners = tantivy.Query.term_set_query(schema, "owner", list(owners))
            self._filter = tantivy.Query.const_score_query(of_owners, 0.0)

    def of(self, query: Any) -> Any:
        """Returns the query restricted to the visible entries; their scores stay as they are."""
        if self._filter is None:
            return query
        must = tantivy.Occur.Must
        return tantivy.Query.boolean_query([(must, query), (must, self._filter)])

    def entries(self) -> int:
        """Counts the visible entries."""
        return int(self._searcher.search(self._filter, 1, count=True).count)

    def frequencies(self, everywhere: Mapping[Term, int], entries: int) -> dict[Term, int]:
        """Returns how many visible entries contain each term, from how many of all do."""
        share = entries / max(1, int(self._searcher.num_docs))
        if self.owners is None:
            return dict(everywhere)
        return {
            term: self._count(term) if 0 < matching <= MAX_COUNTED else round(matching * share)
            for term, matching in everywhere.items()
        }

    def _count(self, term: Term) -> int:
        query = self.of(tantivy.Query.term_query(self._schema, *term, "basic"))
        return int(self._searcher.search(query, 1, count=True).count)


def owner_of(client: str | None) -> int:
    """Returns the number by which the index knows a client; None: EVERYBODY."""
    if client is None:
        return EVERYBODY
    digest = hashlib.blake2b(client.encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> (64 - OWNER_BITS)) + 1


def _boosts(
    weights: Mapping[Term, float],
    everywhere: Mapping[Term, int],
    visible: Mapping[Term, int],
    all_entries: int,
    entries: int,
) -> dict[Term, float]:
    """Returns the weights that turn the engine's scores into those of an index of the visible entries."""
    return {
        term: weights[term]
        * inverse_document_frequency(matching, entries)
        / inverse_document_frequency(min(everywhere[term], all_entries), all_entries)
        for term, matching in visible.items()
        if matching
    }


class Writer:
    """Adds and deletes entries; nothing is visible before `commit`."""

    def __init__(self, inner: Any, schema: Any) -> None:
        self._inner = inner
        self._schema = schema

    def add(self, entry: Entry) -> None:
        """Adds one entry; keeps the others of its key."""
        tokens = tokenize(entry.indexed_text)
        document = tantivy.Document()
        document.add_text("key", entry.key)
        shown = [entry.display_text, entry.source, entry.client]
        document.add_bytes("shown", json.dumps(shown).encode())
        document.add_integer("owner", owner_of(entry.client))
        if entry.task_id is not None:
            document.add_integer("task_id", entry.task_id)
        document.add_text("stems", tokens.stems)
        document.add_text("heads", " ".join(tokens.heads))
        document.add_text("pairs", " ".join(tokens.pairs))
        with _engine_errors():
            self._inner.add_document(document)

    def delete(self, key: str) -> None:
        """Deletes all entries of this key that were added before."""
        with _engine_errors():
            self._inner.delete_documents_by_term("key", key)

    def delete_all(self) -> None:
        with _engine_errors():
            self._inner.delete_all_documents()

    def commit(self) -> None:
        """Publishes the changes to all processes that reload."""
        with _engine_errors():
            self._inner.commit()


def _schema() -> Any:
    builder = tantivy.SchemaBuilder()
    builder.add_text_field("key", tokenizer_name="raw", index_option="basic")
    builder.add_bytes_field("shown", stored=True)
    builder.add_integer_field("task_id", indexed=True, fast=True)
    builder.add_integer_field("owner", indexed=True, fast=True)
    builder.add_text_field("stems", tokenizer_name="stems", index_option="freq")
    for field in ("heads", "pairs"):
        builder.add_text_field(field, tokenizer_name="words", index_option="freq")
    return builder.build()


def _analyzer() -> Any:
    return tantivy.TextAnalyzerBuilder(tantivy.Tokenizer.whitespace())


def _passage(score: float, document: Any, client: str) -> Passage:
    text, source, owner = json.loads(bytes(document.get_first("shown")))
    return Passage(text, source if owner in {None, client} else OTHER_TASK, float(score))


def without_common_terms(frequencies: dict[Term, int]) -> dict[Term, int]:
    """Keeps the rarest terms, up to MAX_POSTINGS in total, but at least one that entries contain.

    Common terms hardly affect the ranking, and reading their postings takes long.
    """
    kept: dict[Term, int] = {}
    left = MAX_POSTINGS
    for term, matching in sorted(frequencies.items(), key=lambda item: item[1]):
        if matching > left and left < MAX_POSTINGS:
            break
        kept[term] = matching
        left -= matching
    return kept


@contextmanager
def _engine_errors() -> Iterator[None]:
    """Turns the exceptions that the engine raises into KnowledgeIndexError."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise KnowledgeIndexError(f"the knowledge index failed: {error}") from error
