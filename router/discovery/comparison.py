"""What a trial says: a candidate's calls beside the incumbent's, prompt by prompt. Pure.

    a call is worth what `worth.call_utility` says, and one that failed nothing
    difference = the candidate's worth less the incumbent's, for each prompt that both were asked
    error      = spread of the differences / sqrt(their number)
    it wins if   mean difference - margin_errors x error > margin

Both answer the same prompts, so that what is hard in a prompt cancels out. The spread is drawn towards a wide
one, as if a few prompts more had shown it: a handful of lucky answers proves nothing.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from router.learning.utility import call_utility
from router.settings import TrialSettings, UtilitySettings
from router.task import Outcome

WIDE_SPREAD = 0.3  # of differences of worth
WIDE_PROMPTS = 5  # that are taken to have shown it
INCUMBENT_MUST_ANSWER = 0.5  # of its calls: else something is wrong that is no model's fault
HOPELESS_CALLS = 5  # none of which was answered
# Against the model; a quota that was used up, or a call that nobody could send, is not.
COUNTED = frozenset(
    {
        Outcome.ANSWERED, Outcome.ERROR, Outcome.TIMEOUT, Outcome.GARBAGE, Outcome.OVERLOADED,
        Outcome.REJECTED, Outcome.UNKNOWN_MODEL,
    }
)  # fmt: skip


class TrialVerdict(str, enum.Enum):
    """What became of a candidate."""

    WON = "won"
    LOST = "lost"
    UNREACHABLE = "unreachable"  # the backend cannot call it, or too few of its calls came through
    VOID = "void"  # the incumbent itself could not be tried: nothing is known of the candidate


@dataclass(frozen=True, slots=True)
class TrialCall:
    """One model's call for one prompt; `outcome` None: no permit in time, or not asked. Grades by source."""

    outcome: Outcome | None = None
    grades: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    cost_usd: float = 0.0
    error: str | None = None

    @property
    def counts(self) -> bool:
        """Whether it says something of its model."""
        return self.outcome in COUNTED

    @property
    def answered(self) -> bool:
        """Whether there is an answer."""
        return self.outcome is Outcome.ANSWERED


@dataclass(frozen=True, slots=True)
class Side:
    """One model's calls in a trial: shares of 1, means of its answered calls, seconds and USD."""

    calls: int
    answered: int
    worth: float
    score: float
    seconds: float
    cost_usd: float

    @property
    def good(self) -> float:
        """The share of its calls that brought a good answer."""
        return self.answered / self.calls * self.score if self.calls else 0.0


@dataclass(frozen=True, slots=True)
class TrialResult:
    """The verdict with what it stands on; `difference` and what follows is over `pairs` prompts."""

    verdict: TrialVerdict
    reason: str
    pairs: int
    candidate: Side
    incumbent: Side
    difference: float = 0.0
    error: float = 0.0
    lower: float = 0.0  # of the difference, by margin_errors errors

    def as_json(self) -> dict[str, Any]:
        """As it is kept, numbers rounded."""
        plain = asdict(self)
        return {key: _rounded(value) for key, value in plain.items() if key not in ("verdict", "reason")}


def judge_trial(
    candidate: Sequence[TrialCall],
    incumbent: Sequence[TrialCall],
    utility: UtilitySettings,
    sources: Mapping[str, float],
    settings: TrialSettings,
) -> TrialResult:
    """What the calls of both, in the order of the same prompts, say of the candidate."""
    pairs = [
        (one, other) for one, other in zip(candidate, incumbent, strict=True) if one.counts and other.counts
    ]
    own = _side([one for one in candidate if one.counts], utility, sources)
    theirs = _side([other for other in incumbent if other.counts], utility, sources)
    differences = [_worth(one, utility, sources) - _worth(other, utility, sources) for one, other in pairs]
    mean, error = _mean_and_error(differences)
    lower = mean - settings.margin_errors * error
    verdict, reason = _hindrance(candidate, incumbent, len(pairs), settings) or (TrialVerdict.WON, "")
    if verdict is TrialVerdict.WON:
        reason = f"worth {own.worth:.3f} against {theirs.worth:.3f}: {mean:+.3f} +- {error:.3f}"
        reason += f" over {len(pairs)} prompts"
        if own.good < utility.floor:
            verdict = TrialVerdict.LOST
            reason = f"{own.good:.0%} of its answers are good, below the floor of {utility.floor:.0%}"
        elif lower <= settings.margin:
            verdict = TrialVerdict.LOST
            reason += f", which is not surely more than {settings.margin:g}"
    return TrialResult(verdict, reason, len(pairs), own, theirs, mean, error, lower)


def _hindrance(
    candidate: Sequence[TrialCall], incumbent: Sequence[TrialCall], pairs: int, settings: TrialSettings
) -> tuple[TrialVerdict, str] | None:
    """Why the calls are not even compared; None if they can be."""
    if any(call.outcome is Outcome.UNKNOWN_MODEL for call in candidate):
        return TrialVerdict.UNREACHABLE, "the Models Backend does not know it, though it names it"
    theirs = [call for call in incumbent if call.counts]
    answered = sum(call.answered for call in theirs)
    if theirs and answered < INCUMBENT_MUST_ANSWER * len(theirs):
        words = f"the incumbent itself answered {answered} of {len(theirs)} calls"
        return TrialVerdict.VOID, f"{words}{_last_error(incumbent)}"
    if is_hopeless(candidate):
        # "Come back later" and nothing else: a key that is refused, or a host that is full.
        away = all(call.outcome is Outcome.OVERLOADED for call in candidate if call.counts)
        verdict = TrialVerdict.UNREACHABLE if away else TrialVerdict.LOST
        return verdict, f"none of its first calls was answered{_last_error(candidate)}"
    if len(theirs) < settings.min_answers:
        words = f"the incumbent could be asked only {len(theirs)} prompts"
        return TrialVerdict.VOID, f"{words}{_last_error(incumbent)}"
    if pairs < settings.min_answers:
        words = f"only {pairs} of its calls can be compared, and {settings.min_answers} are needed"
        return TrialVerdict.UNREACHABLE, f"{words}{_last_error(candidate)}"
    return None


def is_hopeless(calls: Sequence[TrialCall]) -> bool:
    """Whether enough calls count, and none of them was answered."""
    counted = [call for call in calls if call.counts]
    return len(counted) >= HOPELESS_CALLS and not any(call.answered for call in counted)


def is_enough(calls: Sequence[TrialCall]) -> bool:
    """Whether more calls would only cost time and money: so far none came to anything."""
    ended = [call for call in calls if call.outcome is not None or call.error is not None]
    unknown = any(call.outcome is Outcome.UNKNOWN_MODEL for call in ended)
    return unknown or (len(ended) >= HOPELESS_CALLS and not any(call.answered for call in ended))


def _worth(call: TrialCall, utility: UtilitySettings, sources: Mapping[str, float]) -> float:
    if not call.answered:
        return 0.0
    score = _score(call, sources)
    return call_utility(utility, score=score, seconds=call.seconds, cost_usd=call.cost_usd)


def _score(call: TrialCall, sources: Mapping[str, float]) -> float:
    """The weighed mean of its grades; without any that counts it is taken for good."""
    weights = {source: sources.get(source, 0.0) for source in call.grades}
    total = sum(weights.values())
    return sum(weights[source] * grade for source, grade in call.grades.items()) / total if total else 1.0


def _side(calls: Sequence[TrialCall], utility: UtilitySettings, sources: Mapping[str, float]) -> Side:
    answered = [call for call in calls if call.answered]
    return Side(
        calls=len(calls),
        answered=len(answered),
        worth=_mean([_worth(call, utility, sources) for call in calls]),
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
    squares = sum((difference - mean) ** 2 for difference in differences) + WIDE_PROMPTS * WIDE_SPREAD**2
    return mean, math.sqrt(squares / (number + WIDE_PROMPTS - 1) / number)


def _last_error(calls: Sequence[TrialCall]) -> str:
    """What the backend said last; else why there was no permit."""
    errors = [call.error for call in sorted(calls, key=lambda call: call.outcome is not None) if call.error]
    return f": {errors[-1]}" if errors else ""


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    return round(value, 6) if isinstance(value, float) else value
