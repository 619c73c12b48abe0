"""The nightly review: grades a sample of the answers, sums the call log into evidence, and ranks the models.

Each step is idempotent. The new ranking is activated in one transaction, so that a crash leaves the previous
one active. Only one review runs at a time. Workers load the new ranking within a second, when the roster's
version changes.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import psycopg2.extras

from router.database import Connection, advisory_lock, connect, rows, transaction
from router.errors import RouterError
from router.learning.evidence import Moments, PeriodStats, decayed
from router.learning.grading import check
from router.learning.ranking import Candidate, Placed, Standing, rank
from router.learning.shares import ClientBound
from router.settings import LearningSettings

REVIEW_LOCK = 7_205_759_404  # advisory lock; no other part uses this number
BATCH_SIZE = 500  # answers
BOUNDED = frozenset({Standing.BELOW_FLOOR.value, Standing.PROBATION.value})


class ReviewBusy(RouterError):  # noqa: N818 - a state, not a failure
    """Another review is running on this database."""


@dataclass(frozen=True, slots=True)
class RankChange:
    """Rank and standing of one model in one category, before and after a review.

    `place_before` and `standing_before` are those of the ranking that was active when the review began.
    """

    category: str
    model: str
    place_before: int
    place: int
    standing_before: str
    standing: str
    reason: str

    @property
    def changed(self) -> bool:
        """Whether the rank changed, or a limit on the model's share of tasks was added or removed."""
        bounded = (self.standing_before in BOUNDED, self.standing in BOUNDED)
        return self.place_before != self.place or (self.standing_before != self.standing and any(bounded))

    def __str__(self) -> str:
        before, after = Standing(self.standing_before).label, Standing(self.standing).label
        standing = f", {before} -> {after}" if before != after else ""
        return f"{self.category}: {self.model} {self.place_before} -> {self.place}{standing}: {self.reason}"


@dataclass(frozen=True, slots=True)
class Review:
    """Result of a review; `review` is its number, None for a dry run. `ranked` holds every ranked model."""

    review: int | None
    calls_summed: int
    answers_graded: int
    ranked: tuple[RankChange, ...]
    notes: tuple[str, ...]

    @property
    def changes(self) -> tuple[RankChange, ...]:
        """The models whose rank or standing changed."""
        return tuple(change for change in self.ranked if change.changed)


@dataclass(frozen=True, slots=True)
class _Plan:
    period: int
    placed: Mapping[str, list[Placed]] = field(default_factory=dict)  # by category
    standings: Mapping[tuple[str, str], str] = field(default_factory=dict)  # (category, model) -> the old one
    notes: tuple[str, ...] = ()


def run_review(url: str, learning: LearningSettings, *, by: str, dry_run: bool = False) -> Review:
    """Grades answers, sums up the evidence and ranks the models. `url` is the URL of Postgres.

    A dry run rolls everything back. Raises ReviewBusy if another review runs.
    """
    with exclusive_review(url, autocommit=not dry_run) as connection:
        graded = _grade(connection, learning)
        summed = _sum(connection, learning)
        review = _rank(connection, learning, by, dry_run=dry_run)
        return Review(review.review, summed, graded, review.ranked, review.notes)


def grade_answers(url: str, learning: LearningSettings) -> int:
    """Checks a bounded sample of the answers. Returns the number of graded answers."""
    with exclusive_review(url, autocommit=True) as connection:
        return _grade(connection, learning)


def sum_evidence(url: str, learning: LearningSettings) -> int:
    """Sums up the calls of all open periods. Returns the number of calls."""
    with exclusive_review(url, autocommit=True) as connection:
        return _sum(connection, learning)


def rank_models(url: str, learning: LearningSettings, *, by: str) -> Review:
    """Ranks the models by their evidence and activates the ranking."""
    with exclusive_review(url, autocommit=True) as connection:
        return _rank(connection, learning, by, dry_run=False)


def order_by_evidence(connection: Connection, learning: LearningSettings) -> Mapping[str, list[Placed]]:
    """Ranks each category by its evidence, without storing anything."""
    return _plan(connection, learning).placed


@contextmanager
def exclusive_review(url: str, *, autocommit: bool) -> Iterator[Connection]:
    """A connection that holds the lock of the review. Raises ReviewBusy if another session holds it."""
    busy = ReviewBusy("Another review is running on this database. Try again when it has ended.")
    with connect(url, autocommit=autocommit) as connection, advisory_lock(connection, REVIEW_LOCK, busy):
        yield connection


def _open_periods(connection: Connection, learning: LearningSettings) -> list[int]:
    arguments = (learning.period_seconds, learning.memory_periods)
    found = rows(connection, "SELECT * FROM periods_to_sum(%s, %s) AS period", arguments)
    return [row["period"] for row in found]


def _grade(connection: Connection, learning: LearningSettings) -> int:
    graded = 0
    for period in _open_periods(connection, learning):
        with connection.cursor(name="router_answers", withhold=True) as answers:
            arguments = (learning.period_seconds, period, learning.grading.answers)
            answers.execute("SELECT * FROM answers_to_check(%s, %s, %s)", arguments)
            while batch := answers.fetchmany(BATCH_SIZE):
                _store_grades(connection, batch)
                graded += len(batch)
    return graded


def _store_grades(connection: Connection, answers: list[tuple[Any, ...]]) -> None:
    grades = []
    for call_id, prompt, answer, completion_tokens, max_tokens in answers:
        grade = check(prompt, answer, completion_tokens=completion_tokens, max_tokens=max_tokens)
        grades.append((call_id, "check", grade.score, [flaw.value for flaw in grade.flaws]))
    with connection.cursor() as cursor:
        psycopg2.extras.execute_values(
            cursor,
            "INSERT INTO call_scores (call_id, source, score, reasons) VALUES %s ON CONFLICT DO NOTHING",
            grades,
            template="(%s::uuid, %s, %s, %s::text[])",
            page_size=BATCH_SIZE,
        )


def _sum(connection: Connection, learning: LearningSettings) -> int:
    outage = learning.outage
    calls = 0
    for period in _open_periods(connection, learning):
        arguments = (learning.period_seconds, period, outage.seconds, outage.share, outage.models)
        calls += rows(connection, "SELECT sum_evidence(%s, %s, %s, %s, %s) AS calls", arguments)[0]["calls"]
    return calls


def _rank(connection: Connection, learning: LearningSettings, by: str, *, dry_run: bool) -> Review:
    with contextlib.nullcontext() if dry_run else transaction(connection):
        rows(connection, "LOCK TABLE rankings IN SHARE ROW EXCLUSIVE MODE")  # does not block readers
        plan = _plan(connection, learning)
        review = None if dry_run else _store(connection, learning, plan, by)
    return Review(review, 0, 0, tuple(_rank_changes(plan)), plan.notes)


def _plan(connection: Connection, learning: LearningSettings) -> _Plan:
    period_of = "SELECT period_of(clock_timestamp(), %s) AS now"
    now = rows(connection, period_of, (learning.period_seconds,))[0]["now"]
    history = _history(connection, learning, now)
    ranked = rows(
        connection,
        "SELECT k.category, k.model, k.place, k.standing, o.state,"
        " k.category IN (SELECT name FROM categories) AS known"
        " FROM rankings k JOIN roster o USING (model) WHERE o.state IN ('active', 'probation')",
    )
    undone = _undone(connection, learning, now)
    placed: dict[str, list[Placed]] = {}
    notes: list[str] = []
    for category in sorted({row["category"] for row in ranked}):
        models = [row for row in ranked if row["category"] == category]
        if not models[0]["known"]:
            notes.append(f"{category}: not in the config; its ranking was left unchanged")
        elif category in undone:
            notes.append(
                f"{category}: unchanged for {learning.undo_periods} periods after undo {undone[category]}"
            )
        elif not any(history.get((category, row["model"])) for row in models):
            notes.append(f"{category}: no evidence yet; its ranking was left unchanged")
        else:
            candidates = [_candidate(row, history, now, learning) for row in models]
            placed[category] = rank(category, candidates, learning)
    standings = {(row["category"], row["model"]): row["standing"] for row in ranked}
    return _Plan(now, placed, standings, tuple(notes))


def _candidate(
    row: dict[str, Any],
    history: Mapping[tuple[str, str], list[PeriodStats]],
    now: int,
    learning: LearningSettings,
) -> Candidate:
    evidence = decayed(
        history.get((row["category"], row["model"]), []), now,
        half_life=learning.half_life_periods, memory=learning.memory_periods,
        change_errors=learning.change_errors,
        bound=ClientBound(learning.max_client_share, learning.enough_calls),
    )  # fmt: skip
    return Candidate(row["model"], row["place"], evidence, row["state"] == "probation")


def _history(
    connection: Connection, learning: LearningSettings, now: int
) -> dict[tuple[str, str], list[PeriodStats]]:
    found: dict[tuple[str, str], list[PeriodStats]] = {}
    for row in rows(
        connection,
        "SELECT * FROM evidence WHERE period_seconds = %s AND period > %s AND (calls > 0 OR scores <> '{}')",
        (learning.period_seconds, now - learning.memory_periods),
    ):
        stats = PeriodStats(
            row["period"], row["calls"], row["answered"],
            Moments.of(row["timed"], row["log_seconds"], row["log_seconds_squares"]),
            Moments.of(row["priced"], row["cost"], row["cost_squares"]),
            {source: Moments.of(*numbers) for source, numbers in row["scores"].items()},
            row["client"],
        )  # fmt: skip
        found.setdefault((row["category"], row["model"]), []).append(stats)
    return found


def _undone(connection: Connection, learning: LearningSettings, now: int) -> dict[str, int]:
    """category -> the recent undo that changed its ranking."""
    found = rows(
        connection,
        "SELECT p.category, max(r.review) AS undo FROM reviews r JOIN review_places p USING (review)"
        " WHERE r.kind = 'undo' AND p.place <> p.place_before AND r.period_seconds = %s AND r.period > %s"
        " GROUP BY p.category",
        (learning.period_seconds, now - learning.undo_periods),
    )
    return {row["category"]: row["undo"] for row in found}


def _rank_changes(plan: _Plan) -> Iterator[RankChange]:
    for category, order in plan.placed.items():
        for p in order:
            before = plan.standings[category, p.model]
            yield RankChange(category, p.model, p.place_before, p.place, before, p.standing.value, p.reason)


def _store(connection: Connection, learning: LearningSettings, plan: _Plan, by: str) -> int:
    places = [
        {
            "category": category, "topic": "", "model": p.model, "place_before": p.place_before,
            "place": p.place, "standing": p.standing.value, "quality": p.quality,
            "least_share": p.least_share, "most_share": p.most_share, "reason": p.reason,
            "evidence": evidence_json(p),
        }
        for category, order in plan.placed.items()
        for p in order
    ]  # fmt: skip
    stored = rows(
        connection,
        "SELECT record_review(%s, %s, %s, %s::jsonb, %s::text[], %s::jsonb) AS review",
        (by, learning.period_seconds, plan.period, json.dumps(learning.model_dump(mode="json")),
         list(plan.notes), json.dumps(places)),
    )  # fmt: skip
    return int(stored[0]["review"])


def evidence_json(placed: Placed) -> dict[str, Any]:
    """The evidence of a rank as it is stored: effective calls, shares from 0 to 1, seconds and USD."""
    utility, evidence = placed.utility, placed.evidence
    return {
        "calls": round(evidence.calls, 1),
        "newest_calls": evidence.newest_calls,
        "since_period": evidence.since,
        "forgot_before_period": evidence.forgot_before,
        "worth": round(utility.mean, 6), "error": round(utility.error, 6), "bound": round(utility.lower, 6),
        "success": round(utility.success.mean, 6), "success_error": round(utility.success.error, 6),
        "score": round(utility.score.mean, 6), "score_error": round(utility.score.error, 6),
        "seconds": round(utility.seconds, 4), "cost_usd": round(utility.cost_usd, 9),
        "grades": {
            source: {"answers": round(moments.effective, 1), "mean": round(moments.mean, 4)}
            for source, moments in sorted(evidence.scores.items())
        },
    }  # fmt: skip
