"""Rank of a model in a category, as the assignment uses it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RankedModel:
    """Of one model in one category: its quality, and which share of the tasks it may have."""

    quality: float
    least_share: float = 0.0
    most_share: float = 1.0


Rankings = Mapping[str, Mapping[str, RankedModel]]  # category -> model
