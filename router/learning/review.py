"""The nightly review: grade a sample of the answers, sum the log up, order the models anew, put it in force.

Each step may be run again and then changes nothing more; a run that dies leaves the old ranking in force,
since the new one is put there in one transaction. Only one review runs at a time. Workers hear of the new
order through the roster's version, within a second.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import psycopg2
import psycopg2.extras

from router.database import Connection, connect, rows
from router.errors import RouterError
from router.learning.evidence import Moments, PeriodStats, decayed
from router.learning.grading import check
from router.learning.ranking import Candidate, Key, Placed, Standing, rank
from router.settings import LearningSettings

REVIEW_LOCK = 7_205_759_404  # any number that no other part uses as an advisory lock
ANSWERS_AT_ONCE = 500
BOUNDED = frozenset({Standing.LOW.value, Standing.TRIAL.value})


class ReviewBusy(RouterError):  # noqa: N818 - a state of the world, read as one
    """Another review runs on this database."""


@dataclass(frozen=True, slots=True)
class RankChange:
    """One model in one category. `standing_before` and `place_before`: as it was in force."""

    category: str
    model: str
    place_before: int
    place: int
    standing_before: str
    standing: str
    reason: str

    @property
    def is_news(self) -> bool:
        """Whether it is in another place, or gets a bounded share now, or no longer."""
        bounded = (self.standing_before in BOUNDED, self.standing in BOUNDED)
        return self.place_before != self.place or (self.standing_before != self.standing and any(bounded))

    def __str__(self) -> str:
        standing = (
            f", {self.standing_before} -> {self.standing}" if self.standing != self.standing_before else ""
        )
        return f"{self.category}: {self.model} {self.place_before} -> {self.place}{standing}: {self.reason}"


@dataclass(frozen=True, slots=True)
class Review:
    """What a review did, or would do: then `review` is None. `moves` holds all models that were looked at."""

    review: int | None
    calls_summed: int
    answers_graded: int
    moves: tuple[RankChange, ...]
    notes: tuple[str, ...]

    @property
    def news(self) -> tuple[RankChange, ...]:
        """The moves that change a place or a standing."""
        return tuple(move for move in self.moves if move.is_news)


@dataclass(frozen=True, slots=True)
class _Plan:
    period: int
    placed: Mapping[Key, list[Placed]] = field(default_factory=dict)
    standings: Mapping[tuple[str, str], str] = field(default_factory=dict)  # (category, model) -> as it was
    notes: tuple[str, ...] = ()


def run_review(url: str, learning: LearningSettings, *, by: str, dry_run: bool = False) -> Review:
    """The whole review. With `dry_run` nothing is kept. ReviewBusy if another one runs."""
    with alone(url, autocommit=not dry_run) as connection:
        graded = _grade(connection, learning)
        summed = _sum(connection, learning)
        review = _rank(connection, learning, by, dry_run=dry_run)
        return Review(review.review, summed, graded, review.moves, review.notes)


def grade_answers(url: str, learning: LearningSettings) -> int:
    """The first step: cheap checks of a bounded sample. Returns how many answers were graded."""
    with alone(url, autocommit=True) as connection:
        return _grade(connection, learning)


def sum_evidence(url: str, learning: LearningSettings) -> int:
    """The second step: sum up the periods that are not closed. Returns how many calls were read."""
    with alone(url, autocommit=True) as connection:
        return _sum(connection, learning)


def rank_models(url: str, learning: LearningSettings, *, by: str) -> Review:
    """The last step: from the evidence to an order in force."""
    with alone(url, autocommit=True) as connection:
        return _rank(connection, learning, by, dry_run=False)


def order_by_evidence(connection: Connection, learning: LearningSettings) -> Mapping[Key, list[Placed]]:
    """Each ranking as the evidence that is summed up would have it now; nothing is kept."""
    return _plan(connection, learning).placed


@contextmanager
def alone(url: str, *, autocommit: bool) -> Iterator[Connection]:
    """A connection while no other review works on this database. ReviewBusy if one does."""
    with connect(url, autocommit=autocommit) as connection:
        if not rows(connection, "SELECT pg_try_advisory_lock(%s) AS mine", (REVIEW_LOCK,))[0]["mine"]:
            raise ReviewBusy("Another review is running on this database. Wait for it to end, and try again.")
        try:
            yield connection
        finally:  # at the connection's end it would be free too, but a moment after
            with contextlib.suppress(psycopg2.Error):
                connection.rollback()
                rows(connection, "SELECT pg_advisory_unlock(%s)", (REVIEW_LOCK,))


def _periods(connection: Connection, learning: LearningSettings) -> list[int]:
    asked = (learning.period_seconds, learning.memory_periods)
    return [
        row["period"] for row in rows(connection, "SELECT * FROM periods_to_sum(%s, %s) AS period", asked)
    ]


def _grade(connection: Connection, learning: LearningSettings) -> int:
    graded = 0
    for period in _periods(connection, learning):
        with connection.cursor(name="router_answers", withhold=True) as answers:
            asked = (learning.period_seconds, period, learning.grading.answers)
            answers.execute("SELECT * FROM answers_to_check(%s, %s, %s)", asked)
            while some := answers.fetchmany(ANSWERS_AT_ONCE):
                _keep_grades(connection, some)
                graded += len(some)
    return graded


def _keep_grades(connection: Connection, answers: list[tuple[Any, ...]]) -> None:
    kept = []
    for call_id, prompt, answer, completion_tokens, max_tokens in answers:
        grade = check(prompt, answer, completion_tokens=completion_tokens, max_tokens=max_tokens)
        kept.append((call_id, "check", grade.score, [flaw.value for flaw in grade.flaws]))
    with connection.cursor() as cursor:
        psycopg2.extras.execute_values(
            cursor,
            "INSERT INTO call_scores (call_id, source, score, reasons) VALUES %s ON CONFLICT DO NOTHING",
            kept,
            template="(%s::uuid, %s, %s, %s::text[])",
            page_size=ANSWERS_AT_ONCE,
        )


def _sum(connection: Connection, learning: LearningSettings) -> int:
    outage = learning.outage
    calls = 0
    for period in _periods(connection, learning):
        asked = (learning.period_seconds, period, outage.seconds, outage.share, outage.models)
        calls += rows(connection, "SELECT sum_evidence(%s, %s, %s, %s, %s) AS calls", asked)[0]["calls"]
    return calls


def _rank(connection: Connection, learning: LearningSettings, by: str, *, dry_run: bool) -> Review:
    if not dry_run:
        rows(connection, "BEGIN")
    try:
        rows(connection, "LOCK TABLE rankings IN SHARE ROW EXCLUSIVE MODE")  # readers go on
        plan = _plan(connection, learning)
        review = None if dry_run else _keep(connection, learning, plan, by)
    except BaseException:
        if not dry_run:
            rows(connection, "ROLLBACK")
        raise
    if not dry_run:
        rows(connection, "COMMIT")
    return Review(review, 0, 0, tuple(_moves(plan)), plan.notes)


def _plan(connection: Connection, learning: LearningSettings) -> _Plan:
    now = rows(connection, "SELECT period_of(clock_timestamp(), %s) AS now", (learning.period_seconds,))[0][
        "now"
    ]
    history = _history(connection, learning, now)
    standing = rows(
        connection,
        "SELECT k.category, k.model, k.place, k.standing, o.state,"
        " k.category IN (SELECT name FROM categories) AS known"
        " FROM rankings k JOIN roster o USING (model) WHERE o.state IN ('active', 'probation')",
    )
    held = _held(connection, learning, now)
    placed: dict[Key, list[Placed]] = {}
    notes: list[str] = []
    for category in sorted({row["category"] for row in standing}):
        about = [row for row in standing if row["category"] == category]
        if not about[0]["known"]:
            notes.append(f"{category}: no category of the config any more; its ranking was left alone")
        elif category in held:
            notes.append(
                f"{category}: kept as undo {held[category]} set it, for {learning.undo_periods} periods"
            )
        elif not any(history.get((category, row["model"])) for row in about):
            notes.append(f"{category}: no call that counts yet; its ranking was left alone")
        else:
            candidates = [_candidate(row, history, now, learning) for row in about]
            placed[Key(category)] = rank(Key(category), candidates, learning)
    before = {(row["category"], row["model"]): row["standing"] for row in standing}
    return _Plan(now, placed, before, tuple(notes))


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
    )  # fmt: skip
    return Candidate(row["model"], row["place"], evidence, row["state"] == "probation")


def _history(
    connection: Connection, learning: LearningSettings, now: int
) -> dict[tuple[str, str], list[PeriodStats]]:
    found: dict[tuple[str, str], list[PeriodStats]] = {}
    for row in rows(
        connection,
        "SELECT * FROM evidence WHERE period_seconds = %s AND period > %s AND topic = '' AND calls > 0",
        (learning.period_seconds, now - learning.memory_periods),
    ):
        sums = PeriodStats(
            row["period"], row["calls"], row["answered"],
            Moments.of(row["timed"], row["log_seconds"], row["log_seconds_squares"]),
            Moments.of(row["priced"], row["cost"], row["cost_squares"]),
            {source: Moments.of(*numbers) for source, numbers in row["scores"].items()},
        )  # fmt: skip
        found.setdefault((row["category"], row["model"]), []).append(sums)
    return found


def _held(connection: Connection, learning: LearningSettings, now: int) -> dict[str, int]:
    """category -> the undo by which its order is kept."""
    found = rows(
        connection,
        "SELECT p.category, max(r.review) AS undo FROM reviews r JOIN review_places p USING (review)"
        " WHERE r.kind = 'undo' AND p.place <> p.place_before AND r.period_seconds = %s AND r.period > %s"
        " GROUP BY p.category",
        (learning.period_seconds, now - learning.undo_periods),
    )
    return {row["category"]: row["undo"] for row in found}


def _moves(plan: _Plan) -> Iterator[RankChange]:
    for key, order in plan.placed.items():
        for p in order:
            before = plan.standings[key.category, p.model]
            yield RankChange(
                key.category, p.model, p.place_before, p.place, before, p.standing.value, p.reason
            )


def _keep(connection: Connection, learning: LearningSettings, plan: _Plan, by: str) -> int:
    places = [
        {
            "category": key.category, "topic": key.topic, "model": p.model, "place_before": p.place_before,
            "place": p.place, "standing": p.standing.value, "quality": p.quality,
            "least_share": p.least_share, "most_share": p.most_share, "reason": p.reason,
            "evidence": evidence_of(p),
        }
        for key, order in plan.placed.items()
        for p in order
    ]  # fmt: skip
    kept = rows(
        connection,
        "SELECT record_review(%s, %s, %s, %s::jsonb, %s::text[], %s::jsonb) AS review",
        (by, learning.period_seconds, plan.period, json.dumps(learning.model_dump(mode="json")),
         list(plan.notes), json.dumps(places)),
    )  # fmt: skip
    return int(kept[0]["review"])


def evidence_of(placed: Placed) -> dict[str, Any]:
    """What a place stands on, as it is kept: counts as of fresh calls, shares of 1, seconds and USD."""
    worth, evidence = placed.worth, placed.evidence
    return {
        "calls": round(evidence.calls, 1),
        "newest_calls": evidence.newest_calls,
        "since_period": evidence.since,
        "forgot_before_period": evidence.forgot_before,
        "worth": round(worth.mean, 6), "error": round(worth.error, 6), "bound": round(worth.lower, 6),
        "success": round(worth.success.mean, 6), "success_error": round(worth.success.error, 6),
        "score": round(worth.score.mean, 6), "score_error": round(worth.score.error, 6),
        "seconds": round(worth.seconds, 4), "cost_usd": round(worth.cost_usd, 9),
        "grades": {
            source: {"answers": round(moments.effective, 1), "mean": round(moments.mean, 4)}
            for source, moments in sorted(evidence.scores.items())
        },
    }  # fmt: skip
