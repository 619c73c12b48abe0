"""Simulated conditions: how models differ from their table now. Replaced as a whole at run time."""

from __future__ import annotations

import random
from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, Field, model_validator

from models_backend.models import profile_of

MAX_CONDITIONS = 1000


class Condition(BaseModel):
    """One entry of `PUT /conditions`. Without `category` it holds for all that have no entry of their own."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    category: str | None = None
    failing: float = Field(default=0.0, ge=0, le=1)  # share of calls that end in 500
    latency_factor: float = Field(default=1.0, gt=0, le=1000)
    price_factor: float = Field(default=1.0, ge=0, le=1_000_000)
    quality: float | None = Field(default=None, ge=0, le=1)  # probability of a good answer; null: the table's
    served: bool = True  # false: calls are refused with 404, and GET /models does not name it

    @model_validator(mode="after")
    def _a_model_is_served_whole(self) -> Condition:
        if not self.served and self.category is not None:
            raise ValueError("served applies to a whole model: remove the category")
        return self


class Conditions:
    """The active conditions; none at first."""

    def __init__(self, seed: int = 0) -> None:
        self._orders: dict[tuple[str, str | None], Condition] = {}
        self._dice = random.Random(seed)

    def set(self, orders: Sequence[Condition]) -> None:
        """Replaces all conditions. Raises ValueError if there are too many, or two for the same calls."""
        if len(orders) > MAX_CONDITIONS:
            raise ValueError(f"{len(orders)} conditions are too many; at most {MAX_CONDITIONS}")
        found = {(order.model, order.category): order for order in orders}
        if len(found) < len(orders):
            raise ValueError("two conditions have the same model and category")
        self._orders = found

    def active(self) -> list[Condition]:
        return list(self._orders.values())

    def of(self, model: str, category: str) -> Condition:
        """The condition for this model and category; without one, the model's profile applies."""
        order = self._orders.get((model, category)) or self._orders.get((model, None))
        return order or Condition(model=model, failing=profile_of(model).failing)

    def serves(self, model: str) -> bool:
        """Whether the model is served at all."""
        order = self._orders.get((model, None))
        return order is None or order.served

    def fails(self, order: Condition) -> bool:
        """Draws whether this call fails."""
        return order.failing > 0 and self._dice.random() < order.failing
