"""Helpers for tests of the review: a generated call log, and the results of a review."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from router.database import connect, rows
from router.learning.review import Review, run_review
from router.settings.learning import LearningSettings, load_learning
from router.settings.router import load_config

DAY = 86_400

# Calls spread evenly over a time span, each with a task that holds its answer. As in a real call_id, the
# first part is the time and the rest is random.
_CALLS = """
WITH made AS (
    SELECT n, %(since)s::timestamptz + make_interval(secs => %(seconds)s * n / %(calls)s) AS at,
           gen_random_uuid()::text AS r
      FROM generate_series(0, %(calls)s - 1) AS n
), named AS (
    SELECT n, at,
           (left(first_call_id(at)::text, 13) || '-7' || substr(r, 16, 3) || right(r, 18))::uuid AS call_id
      FROM made
), answered AS (
    INSERT INTO tasks (prompt, status, answer, answered_by, answer_rank, answer_call_id, category,
                       prompt_version, created_at, solved_at)
    SELECT %(prompt)s, 'solved', CASE WHEN n < %(bad_answers)s * %(calls)s THEN '' ELSE %(answer)s END,
           %(model)s, 3, call_id, %(category)s, 1, at, at
      FROM named WHERE %(outcome)s = 'answered' AND %(with_answers)s
    RETURNING id, answer_call_id
)
INSERT INTO model_calls (call_id, task_id, prompt_version, model, category, rank, role, client, started_at,
                         sent_at, finished_at, outcome, reserved_tokens, completion_tokens, cost,
                         latency_seconds)
SELECT named.call_id, answered.id, 1, %(model)s, %(category)s, %(rank)s, %(role)s, %(client)s, at, at,
       CASE WHEN %(outcome)s IS NOT NULL THEN at + make_interval(secs => %(latency)s) END, %(outcome)s,
       1000, 50, %(cost)s, %(latency)s * (0.75 + 0.5 * (n %% 100) / 100)
  FROM named LEFT JOIN answered ON answered.answer_call_id = named.call_id
"""


@dataclass(frozen=True)
class Log:
    """Generates calls in the log of the database at `url`."""

    url: str

    def add(
        self,
        model: str,
        calls: int,
        *,
        days_ago: int = 0,
        category: str = "general",
        outcome: str | None = "answered",
        bad_answers: float = 0.0,
        latency: float = 10.0,
        cost: float | None = 0.001,
        seconds: float = 600.0,
        rank: int = 3,
        role: str = "batch",
        client: str = "",
        with_answers: bool = True,
    ) -> None:
        """Adds calls within `seconds` of that day, with a share of empty answers."""
        with connect(self.url) as connection:
            # Early in the period, so that no test spans two periods.
            since = rows(
                connection,
                "SELECT to_timestamp(period_of(clock_timestamp(), %s) * %s - %s * %s) AS since",
                (DAY, float(DAY), days_ago, float(DAY)),
            )[0]["since"]
            rows(
                connection,
                _CALLS,
                {
                    "model": model,
                    "calls": calls,
                    "since": since,
                    "seconds": float(seconds),
                    "category": category,
                    "outcome": outcome,
                    "bad_answers": bad_answers,
                    "latency": latency,
                    "cost": cost,
                    "rank": rank,
                    "role": role,
                    "client": client,
                    "with_answers": with_answers,
                    "prompt": "Who painted the ceiling of the Sistine Chapel?",
                    "answer": "Michelangelo painted the ceiling of the Sistine Chapel between 1508 and 1512.",
                },
            )  # type: ignore[arg-type]  # fmt: skip - psycopg2 takes names too

    def query(self, statement: str, *arguments: Any) -> list[dict[str, Any]]:
        with connect(self.url) as connection:
            return rows(connection, statement, arguments)

    def value(self, statement: str, *arguments: Any) -> Any:
        (row,) = self.query(statement, *arguments)
        return next(iter(row.values()))

    def review(self, learning: LearningSettings | None = None, **more: Any) -> Review:
        return run_review(self.url, learning or shipped_learning(), by=more.pop("by", "a test"), **more)

    def places(self, category: str = "general") -> dict[str, int]:
        found = self.query("SELECT model, place FROM rankings WHERE category = %s ORDER BY place", category)
        return {row["model"]: row["place"] for row in found}

    def rankings(self) -> list[dict[str, Any]]:
        return self.query("SELECT * FROM rankings ORDER BY category, model")

    def version(self) -> int:
        return int(self.value("SELECT last_value FROM roster_version"))


def shipped_learning(**changes: Any) -> LearningSettings:
    """The shipped config/learning.yaml with changes."""
    learning = load_learning(None, load_config().categories)
    return LearningSettings.model_validate({**learning.model_dump(), **changes})
