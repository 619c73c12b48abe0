"""Engines compared by bench/knowledge.py, with one interface: texts in, numbers of the best texts out."""

from __future__ import annotations

import importlib
import os
import sqlite3
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import psycopg2
import psycopg2.extras
from typing_extensions import Self

from local.postgres import start_postgres
from router.knowledge.chunking import Entry
from router.knowledge.index import KnowledgeIndex
from router.knowledge.relevance import WEIGHTS, tokenize

COMMIT_EVERY = 50_000
BATCH = 5000
NEGLIGIBLE = 1e-6


class MissingPackageError(Exception):
    """A package that the engine needs is not installed."""


def package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingPackageError(f"pip install {name}") from error


class Engine(ABC):
    """A search engine with its own folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.closing = ExitStack()
        self.open()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.closing.close()

    def open(self) -> None:  # noqa: B027 - optional
        """Starts what the engine needs. Raises MissingPackageError."""

    @abstractmethod
    def build(self, texts: Sequence[str]) -> None:
        """Indexes all texts under their positions."""

    @abstractmethod
    def search(self, question: str, limit: int) -> list[int]:
        """Returns the positions of the best texts, best first."""

    def disk_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())


class Router(Engine):
    """The router's own: tantivy with three fields."""

    def open(self) -> None:
        self.index = KnowledgeIndex(self.folder)

    def build(self, texts: Sequence[str]) -> None:
        with self.index.writing() as writer:
            for number, text in enumerate(texts):
                writer.add(Entry(str(number), str(number), "", text))
                if number % COMMIT_EVERY == COMMIT_EVERY - 1:
                    writer.commit()
            writer.commit()

    def search(self, question: str, limit: int) -> list[int]:
        return [int(passage.source) for passage in self.index.search(question, limit).passages]


class StemsOnly(Router):
    """The same with stems only, which shows the effect of the other fields."""

    def open(self) -> None:
        super().open()
        self.closing.callback(WEIGHTS.update, dict(WEIGHTS))
        WEIGHTS.update(heads=NEGLIGIBLE, pairs=NEGLIGIBLE)


class Bm25s(Engine):
    """bm25s: precomputed scores in sparse matrices, in memory."""

    def open(self) -> None:
        self.library = package("bm25s")
        self.stemmer = package("Stemmer").Stemmer("english")

    def tokens(self, texts: Sequence[str]) -> Any:
        return self.library.tokenize(list(texts), stopwords="en", stemmer=self.stemmer, show_progress=False)

    def build(self, texts: Sequence[str]) -> None:
        self.index = self.library.BM25(k1=1.2, b=0.75)
        self.index.index(self.tokens(texts), show_progress=False)
        self.count = len(texts)
        self.index.save(self.folder)

    def search(self, question: str, limit: int) -> list[int]:
        tokens = self.library.tokenize(
            [question], stopwords="en", stemmer=self.stemmer, show_progress=False, return_ids=False
        )
        if not tokens[0]:
            return []
        found, _ = self.index.retrieve(tokens, k=min(limit, self.count), show_progress=False)
        return [int(number) for number in found[0]]


class SqliteFts(Engine):
    """SQLite's FTS5 with its own BM25 and the Porter stemmer."""

    def build(self, texts: Sequence[str]) -> None:
        self.database = sqlite3.connect(self.folder / "fts.sqlite")
        self.closing.callback(self.database.close)
        self.database.execute("CREATE VIRTUAL TABLE entries USING fts5(body, tokenize = 'porter unicode61')")
        self.database.executemany("INSERT INTO entries (rowid, body) VALUES (?, ?)", enumerate(texts))
        self.database.execute("INSERT INTO entries (entries) VALUES ('optimize')")
        self.database.commit()

    def search(self, question: str, limit: int) -> list[int]:
        query = " OR ".join(f'"{word}"' for word in dict.fromkeys(tokenize(question).words))
        if not query:
            return []
        rows = self.database.execute(
            "SELECT rowid FROM entries WHERE entries MATCH ? ORDER BY bm25(entries) LIMIT ?", (query, limit)
        )
        return [row[0] for row in rows]


class Postgres(Engine):
    """A separate PostgreSQL from the embedded wheel."""

    def open(self) -> None:
        os.chmod(self.folder, 0o755)  # noqa: PTH101 - PostgreSQL runs as another user
        server = start_postgres(
            self.folder / "data", settings={"fsync": "off", "maintenance_work_mem": "1GB"}
        )
        self.closing.callback(server.stop)
        self.connection = psycopg2.connect(server.create_database("knowledge"))
        self.connection.autocommit = True
        self.closing.callback(self.connection.close)

    def run(self, statement: str, *arguments: Any) -> list[Any]:
        with self.connection.cursor() as cursor:
            cursor.execute(statement, arguments)
            return cursor.fetchall() if cursor.description else []

    def fill(self, table: str, rows: Iterator[tuple[Any, ...]]) -> None:
        with self.connection.cursor() as cursor:
            psycopg2.extras.execute_values(cursor, f"INSERT INTO {table} VALUES %s", rows, page_size=BATCH)

    def disk_bytes(self) -> int:
        return int(self.run("SELECT pg_database_size(current_database())")[0][0])


class PostgresFullText(Postgres):
    """PostgreSQL full text: a GIN index, any of the words, ordered by ts_rank normalized by length."""

    def build(self, texts: Sequence[str]) -> None:
        self.run("CREATE UNLOGGED TABLE entries (id integer, body text)")
        self.fill("entries", ((number, text) for number, text in enumerate(texts)))
        self.run(
            "CREATE UNLOGGED TABLE words AS SELECT id, to_tsvector('english', body) AS seen FROM entries"
        )
        self.run("CREATE INDEX ON words USING gin (seen)")
        self.run("ANALYZE words")

    def search(self, question: str, limit: int) -> list[int]:
        query = " | ".join(dict.fromkeys(tokenize(question).words))
        rows = self.run(
            "SELECT id FROM words, to_tsquery('english', %s) asked WHERE seen @@ asked"
            " ORDER BY ts_rank(seen, asked, 1) DESC LIMIT %s",
            query,
            limit,
        )
        return [row[0] for row in rows]


class Embedding:
    """Static embeddings of wordllama, 256 dimensions; the weights are in its wheel."""

    def __init__(self) -> None:
        wordllama = package("wordllama")
        self.model = wordllama.WordLlama.load(
            cache_dir=Path(wordllama.__file__).parent, disable_download=True
        )

    def __call__(self, texts: Sequence[str]) -> Any:
        with np.errstate(invalid="ignore", divide="ignore"):
            found = self.model.embed(list(texts), norm=True)
        return np.nan_to_num(found).astype(np.float32)


class WordLlama(Engine):
    """Static embeddings, exhaustive search."""

    def open(self) -> None:
        self.embed = Embedding()

    def build(self, texts: Sequence[str]) -> None:
        parts = [self.embed(texts[start : start + BATCH]) for start in range(0, len(texts), BATCH)]
        self.vectors = np.vstack(parts)
        np.save(self.folder / "vectors.npy", self.vectors)

    def scores(self, question: str) -> Any:
        return self.vectors @ self.embed([question])[0]

    def search(self, question: str, limit: int) -> list[int]:
        scores = self.scores(question)
        limit = min(limit, len(scores))
        best = np.argpartition(-scores, limit - 1)[:limit]
        return [int(number) for number in best[np.argsort(-scores[best])]]


class PgVector(Postgres):
    """The same embeddings in pgvector: an HNSW index over their signs, the first 200 re-ranked."""

    def open(self) -> None:
        self.embed = Embedding()
        super().open()
        try:
            self.run("CREATE EXTENSION vector")
        except psycopg2.Error as error:
            raise MissingPackageError("this PostgreSQL has no pgvector") from error

    def build(self, texts: Sequence[str]) -> None:
        self.run("CREATE UNLOGGED TABLE entries (id integer, seen vector(256))")
        self.run("ALTER TABLE entries ALTER COLUMN seen SET STORAGE PLAIN")
        for start in range(0, len(texts), BATCH):
            vectors = self.embed(texts[start : start + BATCH])
            self.fill("entries", ((start + n, str(vector.tolist())) for n, vector in enumerate(vectors)))
        self.run("CREATE INDEX ON entries USING hnsw ((binary_quantize(seen)::bit(256)) bit_hamming_ops)")
        self.run("SET hnsw.ef_search = 200")

    def search(self, question: str, limit: int) -> list[int]:
        query = str(self.embed([question])[0].tolist())
        rows = self.run(
            "SELECT id FROM (SELECT id, seen FROM entries"
            " ORDER BY binary_quantize(seen)::bit(256) <~> binary_quantize(%s::vector) LIMIT 200) AS near"
            " ORDER BY seen <=> %s::vector LIMIT %s",
            query, query, limit,
        )  # fmt: skip
        return [row[0] for row in rows]


class RouterAndWordLlama(Engine):
    """Sum of the router's and the embeddings' scores, which shows whether embeddings improve the ranking."""

    SHARE = 0.3
    FIRST = 200

    def open(self) -> None:
        self.words = Router(self.folder)
        self.meaning = WordLlama(self.folder)

    def build(self, texts: Sequence[str]) -> None:
        self.words.build(texts)
        self.meaning.build(texts)

    def search(self, question: str, limit: int) -> list[int]:
        hits = self.words.index.search(question, self.FIRST).passages
        cosine = self.meaning.scores(question)
        best = hits[0].score if hits else 1.0
        scores = {int(hit.source): hit.score / best + self.SHARE * cosine[int(hit.source)] for hit in hits}
        for number in self.meaning.search(question, self.FIRST):
            scores.setdefault(number, self.SHARE * cosine[number])
        return sorted(scores, key=lambda number: -scores[number])[:limit]


class Lsa(Engine):
    """Latent semantic analysis of the texts: TF-IDF and truncated SVD by scikit-learn."""

    def build(self, texts: Sequence[str]) -> None:
        text = importlib.import_module("sklearn.feature_extraction.text")
        self.words = text.TfidfVectorizer(sublinear_tf=True, stop_words="english", max_features=100_000)
        found = self.words.fit_transform(texts)
        decomposition = importlib.import_module("sklearn.decomposition")
        self.svd = decomposition.TruncatedSVD(min(200, found.shape[0] - 1), random_state=1)
        vectors = self.svd.fit_transform(found).astype(np.float32)
        self.vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)
        np.save(self.folder / "vectors.npy", self.vectors)

    def search(self, question: str, limit: int) -> list[int]:
        scores = self.vectors @ self.svd.transform(self.words.transform([question]))[0].astype(np.float32)
        return [int(number) for number in np.argsort(-scores)[:limit]]


ENGINES: dict[str, Callable[[Path], Engine]] = {
    "router": Router,
    "router, stems only": StemsOnly,
    "router + wordllama": RouterAndWordLlama,
    "bm25s": Bm25s,
    "wordllama": WordLlama,
    "pgvector": PgVector,
    "postgres full text": PostgresFullText,
    "sqlite fts5": SqliteFts,
    "lsa": Lsa,
}
