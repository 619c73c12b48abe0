"""Test data for bench/console.py: models, a million tasks, a day of calls, reviews and a search."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg2
import yaml

from router.settings import DEFAULT_CONFIG_FOLDER

CHUNK = 100_000
CATEGORIES = ("technical", "creative", "general")
MOVE_SECONDS = 0.25
CALLS_A_MOVE = 10
CHANGE_EVERY = 7  # not a multiple of the console's interval

# 2 % of the tasks have failed and 30 % are unsolved.
_TASKS = """
INSERT INTO tasks (prompt, category, status, answer, failure)
SELECT repeat('What has task ' || n || ' been about? ', 5), (%(categories)s::text[])[1 + n %% 3],
       CASE WHEN n %% 100 < 2 THEN 'failed' WHEN n %% 100 < 32 THEN 'unsolved' ELSE 'solved' END,
       CASE WHEN n %% 100 >= 32 THEN repeat('It was about this. ', 20) END,
       CASE WHEN n %% 100 < 2 THEN 'error: the model said no' END
  FROM generate_series(%(first)s, %(last)s) AS n"""
# A tenth of the calls lies in the ten minutes that the plots show.
_CALLS = """
INSERT INTO model_calls (call_id, task_id, prompt_version, model, category, attempt, started_at, sent_at,
                         finished_at, outcome, settlement, error, prompt_tokens, completion_tokens, cost,
                         latency_seconds)
SELECT (left(first_call_id(c.at)::text, 14) || '7' || substr(c.hash, 1, 3) || '-8' || substr(c.hash, 4, 3)
        || '-' || substr(c.hash, 7, 12))::uuid,
       1 + c.n %% %(tasks)s, 1, 'llm-' || lpad((1 + c.n %% %(models)s)::text, 2, '0'),
       (%(categories)s::text[])[1 + c.n %% 3], 1, c.at, c.at, c.at + interval '2 seconds',
       CASE WHEN c.n %% 50 = 0 THEN 'error' ELSE 'answered' END,
       CASE WHEN c.n %% 50 = 0 THEN 'retry' ELSE 'solved' END,
       CASE WHEN c.n %% 50 = 0 THEN 'the model said no' END, 100, 200, 0.001, 1 + c.n %% 7
  FROM (SELECT n, md5(n || clock_timestamp()::text) AS hash,
               clock_timestamp() - CASE WHEN n %% 10 = 0 THEN interval '10 minutes' * n / %(last)s
                                        ELSE interval '20 hours' * n / %(last)s END AS at
          FROM generate_series(1, %(last)s) AS n) AS c"""
_REVIEWS = """
WITH made AS (
    INSERT INTO reviews (kind, by, at, period_seconds, period, moved, settings)
    SELECT 'review', 'night', clock_timestamp() - interval '1 day' * (60 - n), 86400, n, 2, '{}'
      FROM generate_series(1, 60) AS n
    RETURNING review
), placed AS (
    INSERT INTO review_places (review, category, model, place_before, place, standing, before, quality,
                               least_share, most_share, reason, evidence)
    SELECT m.review, k.category, k.model, k.place,
           CASE k.place WHEN 1 THEN 2 WHEN 2 THEN 1 ELSE k.place END, 'ranked', '{}', 0.8,
           0, 1, 'its bound is 0.8, over 500 calls', '{"bound": 0.8}'
      FROM made m CROSS JOIN rankings k
)
UPDATE rankings SET review = (SELECT max(review) FROM made)"""
_SEARCH = """
WITH run AS (INSERT INTO searches (by, ended_at) VALUES ('night', clock_timestamp()) RETURNING search)
INSERT INTO candidates (search, model, category, catalogue, verdict, reason)
SELECT run.search, 'candidate-' || n, c.category, 'mock',
       CASE WHEN n %% 5 = 0 THEN 'lost' ELSE 'refused' END, 'scores 0.41, below 0.6; its price is unknown'
  FROM run, generate_series(1, 300) AS n, unnest(%s::text[]) AS c (category)"""
_MOVE = """
INSERT INTO model_calls (call_id, task_id, prompt_version, model, category, attempt, sent_at, finished_at,
                         outcome, settlement, cost, latency_seconds)
SELECT (left(first_call_id(clock_timestamp())::text, 14) || '7' || substr(h, 1, 3) || '-8' || substr(h, 4, 3)
        || '-' || substr(h, 7, 12))::uuid,
       n * 1000 + extract(second FROM clock_timestamp())::integer, 1,
       'llm-' || lpad(n::text, 2, '0'), 'general', 1, clock_timestamp(), clock_timestamp(),
       'answered', 'solved', 0.001, 1.5
  FROM (SELECT n, md5(n || clock_timestamp()::text) AS h FROM generate_series(1, %s) AS n) AS fresh"""
_CHANGE = (
    "INSERT INTO tasks (prompt, category, status, failure) VALUES ('?', 'general', 'failed', 'just now')"
)
_FAILED = "SELECT sum(failed)::bigint FROM task_counts_now"


def write_models(folder: Path, models: int) -> None:
    """Writes a `models.yaml` with this number of models into a copied config folder."""
    config = yaml.safe_load((DEFAULT_CONFIG_FOLDER / "models.yaml").read_text())
    config["models"] = {
        f"llm-{number:02}": {"target": "120/min, 4/s, 20 at once", "ranks": dict.fromkeys(CATEGORIES, number)}
        for number in range(1, models + 1)
    }
    if "models" in config.get("fallback", {}):
        config["fallback"]["models"] = ["llm-01"]
    (folder / "models.yaml").write_text(yaml.safe_dump(config))


def fill(url: str, *, tasks: int, calls: int, models: int, report: Callable[[str], None]) -> None:
    """Fills the tables, which takes minutes."""
    connection = psycopg2.connect(url)
    connection.autocommit = True
    try:
        with connection.cursor() as cursor:
            cursor.execute("SET synchronous_commit = off")
            for first in range(1, tasks + 1, CHUNK):
                last = min(first + CHUNK - 1, tasks)
                cursor.execute(_TASKS, {"first": first, "last": last, "categories": list(CATEGORIES)})
                report(f"{last:,} tasks")
            about = {"tasks": tasks, "models": models, "last": calls, "categories": list(CATEGORIES)}
            cursor.execute(_CALLS, about)
            report(f"{calls:,} calls")
            cursor.execute(_REVIEWS)
            cursor.execute(_SEARCH, (list(CATEGORIES),))
            for table in ("tasks", "queue", "model_calls", "task_failures", "review_places", "candidates"):
                cursor.execute(f"VACUUM ANALYZE {table}")
            report("vacuumed")
    finally:
        connection.close()


class Mover(threading.Thread):
    """Adds calls and failures until it is stopped. `changes`: number of failures -> time."""

    def __init__(self, url: str) -> None:
        super().__init__(name="console bench mover", daemon=True)
        self._connection: Any = psycopg2.connect(url)
        self._connection.autocommit = True
        self._stopped = threading.Event()
        self.changes: dict[int, float] = {}
        self.broken: str | None = None

    def run(self) -> None:
        try:
            self._move()
        except psycopg2.Error as error:
            self.broken = str(error)

    def _move(self) -> None:
        with self._connection.cursor() as cursor:
            cursor.execute(_FAILED)
            failed = cursor.fetchone()[0]
            number = 0
            while not self._stopped.wait(MOVE_SECONDS):
                number += 1
                cursor.execute(_MOVE, (CALLS_A_MOVE,))
                if number % CHANGE_EVERY == 0:
                    cursor.execute(_CHANGE)
                    failed += 1
                    self.changes[failed] = time.monotonic()

    def stop(self) -> None:
        """Stops and waits."""
        self._stopped.set()
        self.join()
        self._connection.close()
