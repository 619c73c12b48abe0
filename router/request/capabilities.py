"""Capabilities that requests need, and what happens where they are missing. No I/O."""

from __future__ import annotations

import enum
from collections.abc import Collection

from router.request.errors import RequestError
from router.request.messages import PART_CAPABILITIES
from router.request.model_request import ModelRequest
from router.request.parameters import Parameters


class Unsupported(str, enum.Enum):
    """Treatment of sampling parameters that the backend or the model does not support."""

    REFUSE = "refuse"
    IGNORE = "ignore"  # with a note


# They change how an answer is drawn, not what it has to be.
SAMPLING = frozenset(
    {
        *("temperature", "top_p", "top_k", "min_p", "seed", "presence_penalty", "frequency_penalty"),
        *("repetition_penalty", "logit_bias", "reasoning_effort", "verbosity"),
    }
)
# They change nothing in the answer: where they are not supported, they stay in the stored request.
HINTS = frozenset(
    {
        *("metadata", "user", "safety_identifier", "service_tier"),
        *("prompt_cache_key", "prompt_cache_options", "prompt_cache_retention"),
    }
)
_FORMATS = frozenset({"json_object", "json_schema"})
_OF_OTHERS = frozenset({"response_format", "tool_choice", "parallel_tool_calls"})  # of a format, and of tools
# Everything that a backend of texts can support, and with parts of other kinds.
TEXT_CAPABILITIES = (frozenset(Parameters.model_fields) - _OF_OTHERS) | _FORMATS
CAPABILITIES = TEXT_CAPABILITIES | PART_CAPABILITIES


def check_supported(
    request: ModelRequest, capabilities: Collection[str], *, who: str, unsupported: Unsupported
) -> tuple[str, ...]:
    """Returns the parameters that are not sent, which change nothing or may be ignored.

    Raises RequestError for the first other one that needs a capability which `who` does not have.
    """
    ignored: list[str] = []
    for capability, path in request.needs():
        name = path.partition(".")[0]
        if capability in capabilities:
            continue
        if name in HINTS or (name in SAMPLING and unsupported is Unsupported.IGNORE):
            ignored.append(name)
            continue
        remedy = "Remove it, or name a model that supports it"
        raise RequestError(
            f"{path} needs {capability}, which {who} does not support. {remedy}", path, unsupported=True
        )
    return tuple(ignored)
