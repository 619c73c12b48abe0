"""Latency of a call, drawn from (seed, model, prompt), so that a replay draws the same."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from itertools import pairwise
from statistics import NormalDist

from models_backend.chance import chance
from models_backend.models import profile_of

SHORTEST_SECONDS = 1.0
LONGEST_SECONDS = 120.0
SHAPES = "profile, llmperf, even:LOW:HIGH or lognormal:MEDIAN:SIGMA:LOW:HIGH (seconds)"

# End-to-end seconds of hosted Llama 2 calls, as LLMPerf measured them: a few seconds, with a long tail.
LLMPERF_QUANTILES = (
    (0.0, 0.75), (0.1, 1.45), (0.25, 1.97), (0.5, 2.5), (0.75, 3.55),
    (0.9, 4.0), (0.95, 6.92), (0.99, 7.43), (0.995, 7.83), (0.999, 101.5), (1.0, 120.0),
)  # fmt: skip


def latency_seconds(
    model: str, prompt: str, *, seed: int = 0, shape: str = "profile", time_scale: float = 1.0
) -> float:
    """Seconds that `model` takes for `prompt`; the same for the same arguments on every machine.

    `shape` is one of SHAPES; `profile` is LLMPerf's shape times the model's slowness, within 1 s to 2 min.
    """
    share = chance(seed, "latency", model, prompt)
    if shape == "profile":
        slow = _llmperf(share) * profile_of(model).slowness
        return min(max(slow, SHORTEST_SECONDS), LONGEST_SECONDS) / time_scale
    return parse_shape(shape)(share) / time_scale


@functools.lru_cache(maxsize=32)
def parse_shape(shape: str) -> Callable[[float], float]:
    """The inverse distribution function of a shape, in seconds. Raises ValueError with the grammar."""
    name, *words = shape.split(":")
    try:
        numbers = [float(word) for word in words]
    except ValueError:
        numbers = []
    if shape in {"llmperf", "profile"}:
        return _llmperf
    if not all(math.isfinite(number) and number >= 0 for number in numbers):
        numbers = []
    if name == "even" and len(numbers) == 2 and numbers[0] <= numbers[1]:
        return functools.partial(_even, *numbers)
    if name == "lognormal" and len(numbers) == 4 and numbers[0] > 0 and numbers[2] <= numbers[3]:
        return functools.partial(_lognormal, *numbers)
    raise ValueError(f"{shape!r} is not a latency shape. Use {SHAPES}, e.g. even:1:120")


def _even(low: float, high: float, share: float) -> float:
    return low + (high - low) * share


def _lognormal(median: float, sigma: float, low: float, high: float, share: float) -> float:
    return min(max(median * math.exp(sigma * NormalDist().inv_cdf(share)), low), high)


def _llmperf(share: float) -> float:
    for (left, low), (right, high) in pairwise(LLMPERF_QUANTILES):
        if share <= right:
            return float(low * (high / low) ** ((share - left) / (right - left)))
    return LLMPERF_QUANTILES[-1][1]
