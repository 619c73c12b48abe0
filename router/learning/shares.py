"""Bounds the weight of a client in a model's evidence. Pure.

A client that sends most of a model's calls could otherwise decide its rank. With n_i observations of client i
and a bound b, it counts as min(n_i, c) observations, where

    c = b x (sum of min(n_j, c))     no client has more than the share b of what counts
    c >= floor                       but as many observations as rank a model may always count

so a client counts as if it had sent only c calls, drawn at random. b is at least 1 / (number of clients). The
bound does not apply to a single client.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

OTHERS = "*"  # all but the largest clients of a period: never bounded


@dataclass(frozen=True, slots=True)
class ClientBound:
    """The largest share of a client, and the number of observations that a client may always count as."""

    share: float
    floor: float = 0.0

    def of(self, clients: int) -> float:
        """The share for so many clients: they cannot all stay below a smaller one."""
        return max(self.share, 1 / max(1, clients))

    def is_met_by(self, some: int, clients: int) -> bool:
        """Whether `some` of the clients are enough for each to stay within the share of all."""
        return some >= min(clients, math.ceil(1 / self.share))


UNBOUNDED = ClientBound(1.0)


def client_shares(counts: Mapping[str, float], clients: int, bound: ClientBound) -> dict[str, float]:
    """Returns client -> the share of its observations that counts. Of `clients` some may have none."""
    named = sorted(count for client, count in counts.items() if client != OTHERS)
    limit = math.inf
    if clients > 1:
        limit = max(bound.floor, _limit(named, counts.get(OTHERS, 0.0), bound.of(clients)))
    return {
        client: 1.0 if client == OTHERS or count <= limit else limit / count
        for client, count in counts.items()
    }


def _limit(counts: list[float], others: float, share: float) -> float:
    """The largest c with c <= share x (others + sum of min(n, c)); `counts` in ascending order.

    With the m largest counts above c, c = share x (the rest) / (1 - share x m).
    """
    rest = others + math.fsum(counts)
    for above in range(len(counts)):
        left = 1 - share * above
        if left <= 0:
            break
        limit = share * rest / left
        if counts[-1 - above] <= limit * (1 + 1e-9):
            return limit
        rest -= counts[-1 - above]
    return 0.0
