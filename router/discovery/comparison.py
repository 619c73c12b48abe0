"""Compares a candidate's trial calls with the incumbent's, prompt by prompt. Pure.

    utility of a call = `utility.call_utility`; 0 for a failed call
    difference        = utility of the candidate's call - utility of the incumbent's, per prompt
    error             = standard deviation of the differences / sqrt(number of prompts)
    the candidate wins if  mean difference - margin_errors x error > margin

Pairing cancels the difficulty of a prompt. The variance is shrunk towards a high prior, with the weight of
PRIOR_PROMPTS prompts, so that a handful of lucky answers proves nothing.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from router.learning.utility import call_utility
from router.settings import TrialSettings, UtilitySettings
from router.task import Outcome

PRIOR_DEVIATION = 0.3  # of differences of utility
PRIOR_PROMPTS = 5
MIN_INCUMBENT_ANSWERS = 0.5  # share of its calls; below it the backend is at fault, not a model
MAX_FAILED_FIRST_CALLS = 5


class TrialVerdict(str, enum.Enum):
    """Verdict on a candidate."""

    WON = "won"
    LOST = "lost"
    UNREACHABLE = "unreachable"  # unknown to the backend, or too few calls succeeded
    VOID = "void"  # the incumbent failed, so that the trial shows nothing


@dataclass(frozen=True, slots=True)
class TrialCall:
    """One model's call for one prompt, with grades by source.

    `outcome` None: no permit in time, or not sent.
    """

    outcome: Outcome | None = None
    grades: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    cost_usd: float = 0.0
    error: str | None = None

    @property
    def counts(self) -> bool:
        """Whether the outcome is the model's. In a trial both models get the same prompts."""
        return self.outcome is not None and (self.outcome.is_evidence or self.outcome is Outcome.REJECTED)

    @property
    def answered(self) -> bool:
        return self.outcome is Outcome.ANSWERED


@dataclass(frozen=True, slots=True)
class Side:
    """One model's calls in a trial: mean utility of all; mean score, seconds and USD of the answered ones."""

    calls: int
    answered: int
    utility: float
    score: float
    seconds: float
    cost_usd: float

    @property
    def good(self) -> float:
        """The share of calls with a good answer."""
        return self.answered / self.calls * self.score if self.calls else 0.0


@dataclass(frozen=True, slots=True)
class TrialResult:
    """The verdict and its basis: mean difference, standard error and lower bound over `pairs` prompts."""

    verdict: TrialVerdict
    reason: str
    pairs: int
    candidate: Side
    incumbent: Side
    difference: float = 0.0
    error: float = 0.0
    lower: float = 0.0

    def as_json(self) -> dict[str, Any]:
        """The basis of the verdict as it is stored, rounded."""
        plain = asdict(self)
        return {key: _stored(value) for key, value in plain.items() if key not in ("verdict", "reason")}


def judge_trial(
    candidate: Sequence[TrialCall],
    incumbent: Sequence[TrialCall],
    utility: UtilitySettings,
    sources: Mapping[str, float],
    settings: TrialSettings,
    *,
    elsewhere: Sequence[TrialCall] = (),
) -> TrialResult:
    """Decides on a candidate from both models' calls, given in the order of the same prompts.

    `elsewhere` are the candidate's calls for other categories: a model that fails there as well is not called
    again here.
    """
    pairs = [
        (one, other) for one, other in zip(candidate, incumbent, strict=True) if one.counts and other.counts
    ]
    own = _side([one for one in candidate if one.counts], utility, sources)
    other = _side([other for other in incumbent if other.counts], utility, sources)
    differences = [_utility(one, utility, sources) - _utility(two, utility, sources) for one, two in pairs]
    mean, error = _mean_and_error(differences)
    lower = mean - settings.margin_errors * error
    verdict, reason = _obstacle(candidate, incumbent, elsewhere, len(pairs), settings) or (
        TrialVerdict.WON,
        "",
    )
    if verdict is TrialVerdict.WON:
        reason = f"utility {own.utility:.3f} against {other.utility:.3f}: {mean:+.3f} +- {error:.3f}"
        reason += f" over {len(pairs)} prompts"
        if own.good < utility.floor:
            verdict = TrialVerdict.LOST
            reason = f"{own.good:.0%} of its answers are good, below the floor of {utility.floor:.0%}"
        elif lower <= settings.margin:
            verdict = TrialVerdict.LOST
            is_worse = mean + settings.margin_errors * error < 0
            more = f"not significantly more than {settings.margin:g}"
            reason += f", {'significantly less' if is_worse else more}"
    return TrialResult(verdict, reason, len(pairs), own, other, mean, error, lower)


def could_win(
    candidate: Sequence[TrialCall], incumbent: Sequence[TrialCall], judged: Collection[int], *,
    utility: UtilitySettings, sources: Mapping[str, float], settings: TrialSettings,
    elsewhere: Sequence[TrialCall] = (),
) -> bool:  # fmt: skip
    """Whether the candidate could still win if a judge preferred its answers to the prompts `judged`."""

    def judge(calls: Sequence[TrialCall], grade: float) -> list[TrialCall]:
        return [
            replace(call, grades={**call.grades, "judge": grade}) if number in judged else call
            for number, call in enumerate(calls)
        ]

    best = judge_trial(
        judge(candidate, 1.0), judge(incumbent, 0.0), utility, sources, settings, elsewhere=elsewhere
    )  # fmt: skip
    return best.verdict in {TrialVerdict.WON, TrialVerdict.LOST} and best.difference > settings.margin


def _obstacle(
    candidate: Sequence[TrialCall],
    incumbent: Sequence[TrialCall],
    elsewhere: Sequence[TrialCall],
    pairs: int,
    settings: TrialSettings,
) -> tuple[TrialVerdict, str] | None:
    """The reason why the calls cannot be compared; None if they can."""
    own = [*elsewhere, *candidate]
    if any(call.outcome is Outcome.UNKNOWN_MODEL for call in own):
        return TrialVerdict.UNREACHABLE, "the Models Backend lists it but does not know it"
    counted = [call for call in incumbent if call.counts]
    answered = sum(call.answered for call in counted)
    if counted and answered < MIN_INCUMBENT_ANSWERS * len(counted):
        reason = f"the incumbent answered only {answered} of {len(counted)} calls"
        return TrialVerdict.VOID, f"{reason}{_last_error(incumbent)}"
    if _fails_always(own):
        # Only "try again later" means a refused key or a full host.
        is_away = all(call.outcome is Outcome.OVERLOADED for call in own if call.counts)
        verdict = TrialVerdict.UNREACHABLE if is_away else TrialVerdict.LOST
        return verdict, f"none of its first calls was answered{_last_error(own)}"
    if len(counted) < settings.min_answers:
        reason = f"the incumbent could be called for only {len(counted)} prompts"
        return TrialVerdict.VOID, f"{reason}{_last_error(incumbent)}"
    if pairs < settings.min_answers:
        reason = f"only {pairs} of its calls can be compared, {settings.min_answers} are needed"
        return TrialVerdict.UNREACHABLE, f"{reason}{_last_error(candidate)}"
    return None


def _fails_always(calls: Sequence[TrialCall]) -> bool:
    counted = [call for call in calls if call.counts]
    return len(counted) >= MAX_FAILED_FIRST_CALLS and not any(call.answered for call in counted)


def has_failed(calls: Sequence[TrialCall]) -> bool:
    """Whether further calls are useless: the model is unknown, or none of its first calls was answered."""
    ended = [call for call in calls if call.outcome is not None or call.error is not None]
    is_unknown = any(call.outcome is Outcome.UNKNOWN_MODEL for call in ended)
    return is_unknown or (len(ended) >= MAX_FAILED_FIRST_CALLS and not any(call.answered for call in ended))


def _utility(call: TrialCall, utility: UtilitySettings, sources: Mapping[str, float]) -> float:
    if not call.answered:
        return 0.0
    score = _score(call, sources)
    return call_utility(utility, score=score, seconds=call.seconds, cost_usd=call.cost_usd)


def _score(call: TrialCall, sources: Mapping[str, float]) -> float:
    """The weighted mean of the grades; 1 without any grade of a weighted source."""
    weights = {source: sources.get(source, 0.0) for source in call.grades}
    total = sum(weights.values())
    return sum(weights[source] * grade for source, grade in call.grades.items()) / total if total else 1.0


def _side(calls: Sequence[TrialCall], utility: UtilitySettings, sources: Mapping[str, float]) -> Side:
    answered = [call for call in calls if call.answered]
    return Side(
        calls=len(calls),
        answered=len(answered),
        utility=_mean([_utility(call, utility, sources) for call in calls]),
        score=_mean([_score(call, sources) for call in answered]),
        seconds=_mean([call.seconds for call in answered]),
        cost_usd=_mean([call.cost_usd for call in answered]),
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _mean_and_error(differences: Sequence[float]) -> tuple[float, float]:
    if not differences:
        return 0.0, 0.0
    mean, number = _mean(differences), len(differences)
    squares = sum((difference - mean) ** 2 for difference in differences)
    squares += PRIOR_PROMPTS * PRIOR_DEVIATION**2
    return mean, math.sqrt(squares / (number + PRIOR_PROMPTS - 1) / number)


def _last_error(calls: Sequence[TrialCall]) -> str:
    """The last error of the backend; without one, the reason why there was no permit."""
    errors = [call.error for call in sorted(calls, key=lambda call: call.outcome is not None) if call.error]
    return f": {errors[-1]}" if errors else ""


def _stored(value: Any) -> Any:
    if isinstance(value, dict):  # a Side, whose utility is stored as "worth"
        return {"worth" if key == "utility" else key: _stored(inner) for key, inner in value.items()}
    return round(value, 6) if isinstance(value, float) else value
