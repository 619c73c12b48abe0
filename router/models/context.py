"""Context lengths: which prompts a model takes, by their bytes and its tokens per byte. Pure.

Tokens per byte are learned per model from the log (`learn_tokens` in Postgres). Until then the prior applies:
English text has about four bytes per token. A model is passed over if the expected tokens do not fit. The
model that takes most gets what may fit, so that a text with unusually few tokens is not refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from router.models.roster import RosterModel
from router.task import ContextLimit
from router.traffic import MAX_COUNT, TrafficTarget

PRIOR_TOKENS_PER_BYTE = 0.25
PRIOR_SPREAD = 0.025
DEVIATIONS = 2.0  # below the mean, for the model that takes most
PRIOR_PROMPT_TOKENS = 250  # of a call, until the log knows
PACING_SECONDS = 3600


def context_limits(
    models: Mapping[str, RosterModel], targets: Mapping[str, TrafficTarget] | None = None
) -> dict[str, ContextLimit]:
    """Returns the limit of each model. A token limit in its target counts like a context of that length."""
    windows = {name: _token_limit((targets or {}).get(name)) for name in models}
    tokens = {
        name: min(model.context_tokens or MAX_COUNT, windows[name] or MAX_COUNT)
        for name, model in models.items()
    }
    capacity = {name: tokens[name] / _low(model) for name, model in models.items()}
    most = max(capacity.values(), default=0.0)
    return {
        name: ContextLimit(
            model=name, tokens=tokens[name], token_limit=windows[name], is_largest=capacity[name] >= most,
            tokens_per_byte=_low(model) if capacity[name] >= most else _mean(model),
        )
        for name, model in models.items()
    }  # fmt: skip


def calls_per_second(target: TrafficTarget, model: RosterModel) -> float | None:
    """Estimates the calls a second that a target allows; None without limits of requests, tokens or money.

    A budget of more than an hour sets no pace: it may be spent at any time of its period.
    """
    tokens = model.tokens_per_call or PRIOR_PROMPT_TOKENS + model.max_tokens
    rates = [limit.per_second / max(1.0, tokens) for limit in target.tokens]
    cost = tokens * (model.input_price + model.output_price) / 2
    budgets = [limit for limit in target.money if limit.window_seconds <= PACING_SECONDS]
    rates += [limit.per_second / max(1.0, cost) for limit in budgets]
    by_requests = target.requests_per_second()
    return min([*rates, *([] if by_requests is None else [by_requests])], default=None)


def _token_limit(target: TrafficTarget | None) -> int | None:
    """Returns the most tokens that one call may ever reserve; None without a limit, or if it is stopped."""
    if target is None or target.stopped:
        return None
    return min((limit.count for limit in target.tokens), default=None)


def _mean(model: RosterModel) -> float:
    return model.tokens_per_byte or PRIOR_TOKENS_PER_BYTE


def _low(model: RosterModel) -> float:
    spread = PRIOR_SPREAD if model.tokens_per_byte is None or model.spread is None else model.spread
    return max(_mean(model) - DEVIATIONS * spread, _mean(model) / 2)


def longest_first(limits: Mapping[str, ContextLimit]) -> list[ContextLimit]:
    """Returns the limits, most tokens first."""
    return sorted(limits.values(), key=lambda limit: (-limit.tokens, limit.model))


def too_long(limit: ContextLimit, prompt_bytes: int, max_tokens: int) -> str:
    """Returns the message for a prompt that does not fit; the words are those of OpenAI's API."""
    needed = math.ceil(prompt_bytes * limit.tokens_per_byte)
    return (
        f"This model's maximum context length is {limit.tokens} tokens ({limit.model}). However, you "
        f"requested about {needed + max_tokens} tokens ({needed} in the messages, {max_tokens} in the "
        "completion). "
        "Please reduce the length of the messages or completion."
    )
