"""The weather: what has become of models since their table was written. Set at run time, as a whole."""

from __future__ import annotations

import random
from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, Field, model_validator

MOST_ORDERS = 1000


class WeatherOrder(BaseModel):
    """What `PUT /weather` takes a list of. Without `category`: all that have no order of their own."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    category: str | None = None
    failing: float = Field(default=0.0, ge=0, le=1)  # the share of calls that end in 500
    latency_factor: float = Field(default=1.0, gt=0, le=1000)
    price_factor: float = Field(default=1.0, ge=0, le=1_000_000)
    quality: float | None = Field(default=None, ge=0, le=1)  # the chance of a good answer; null: the table's
    served: bool = True  # false: calls are refused with 404, and GET /models does not name it

    @model_validator(mode="after")
    def _a_model_is_served_whole(self) -> WeatherOrder:
        if not self.served and self.category is not None:
            raise ValueError("served is said of a whole model: leave the category out")
        return self


class Weather:
    """The orders in force; none at first."""

    def __init__(self, seed: int = 0) -> None:
        self._orders: dict[tuple[str, str | None], WeatherOrder] = {}
        self._dice = random.Random(seed)

    def set(self, orders: Sequence[WeatherOrder]) -> None:
        """Put these in force, and no others. ValueError if they are too many, or two say the same thing."""
        if len(orders) > MOST_ORDERS:
            raise ValueError(f"{len(orders)} orders are too many; at most {MOST_ORDERS}")
        found = {(order.model, order.category): order for order in orders}
        if len(found) < len(orders):
            raise ValueError("there is more than one order for the same model and category")
        self._orders = found

    def in_force(self) -> list[WeatherOrder]:
        return list(self._orders.values())

    def of(self, model: str, category: str) -> WeatherOrder:
        """The order for calls of this model in this category; one that changes nothing if there is none."""
        order = self._orders.get((model, category)) or self._orders.get((model, None))
        return order or WeatherOrder(model=model)

    def serves(self, model: str) -> bool:
        """Whether the model is there at all."""
        order = self._orders.get((model, None))
        return order is None or order.served

    def strikes(self, order: WeatherOrder) -> bool:
        """Whether this call is one of those that fail: drawn anew for each call."""
        return order.failing > 0 and self._dice.random() < order.failing
