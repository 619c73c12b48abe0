"""Latency and quality of each model; fixed, so that learning can be evaluated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from models_backend.chance import chance


@dataclass(frozen=True, slots=True)
class Profile:
    """`slowness` multiplies the latency; `quality` is the probability of a good answer by category.

    `failing` is the share of calls that end in 500.
    """

    slowness: float
    quality: Mapping[str, float]
    failing: float = 0.0

    def quality_for(self, category: str) -> float:
        """Probability of a good answer; for an unknown category the mean of all."""
        return self.quality.get(category, sum(self.quality.values()) / len(self.quality))


def _profile(
    slowness: float, technical: float, creative: float, general: float, *, failing: float = 0.0
) -> Profile:
    return Profile(slowness, {"technical": technical, "creative": creative, "general": general}, failing)


PROFILES: Mapping[str, Profile] = {
    "llama-3.1-8b": _profile(0.6, 0.62, 0.70, 0.78),
    "llama-3.3-70b": _profile(1.8, 0.84, 0.86, 0.87),
    "qwen-2.5-72b": _profile(2.2, 0.93, 0.78, 0.87),
    "mistral-small-24b": _profile(1.0, 0.74, 0.80, 0.84),
    "mixtral-8x22b": _profile(2.8, 0.78, 0.90, 0.83),
    "gemma-2-27b": _profile(1.2, 0.70, 0.94, 0.82),
    "deepseek-v3": _profile(4.0, 0.96, 0.82, 0.90),
    "phi-4": _profile(0.8, 0.82, 0.58, 0.72),
    "command-r-plus": _profile(3.2, 0.66, 0.84, 0.89),
    "gpt-4o-mini": _profile(0.7, 0.80, 0.83, 0.88),
    # Models of config/llama_catalog.yaml: three are better than the first of a category, of two only the
    # benchmark scores are, one answers no call.
    "llama-4-maverick": _profile(0.9, 0.80, 0.98, 0.99),
    "llama-3.3-nemotron-super-49b": _profile(1.5, 0.99, 0.72, 0.84),
    "hermes-4-70b": _profile(1.1, 0.78, 0.96, 0.85),
    "llama-3.1-70b-paragon": _profile(1.6, 0.45, 0.40, 0.50),
    "llama-3.3-70b-atelier": _profile(1.4, 0.60, 0.55, 0.65),
    "qwen3-32b": _profile(1.3, 0.80, 0.80, 0.80, failing=1.0),
}


def profile_of(model: str) -> Profile:
    """The model's profile; for an unknown name, one drawn from the name."""
    known = PROFILES.get(model)
    if known is not None:
        return known
    qualities = (
        0.55 + 0.4 * chance("quality", model, category) for category in ("technical", "creative", "general")
    )
    return _profile(0.6 + 3.4 * chance("slowness", model), *qualities)
