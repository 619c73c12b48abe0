"""Rank of a model in a category, as the assignment uses it. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RankedModel:
    """Quality of one model in one category (0 to 1), and the bounds of its share of the tasks."""

    quality: float
    least_share: float = 0.0
    most_share: float = 1.0


Rankings = Mapping[str, Mapping[str, RankedModel]]  # category -> model
