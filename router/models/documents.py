"""Documents that the Models Backend receives: one request by the configured fields. No I/O."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from router.models.call_request import CallRequest
from router.settings import BackendSettings


def request_document(request: CallRequest, settings: BackendSettings) -> dict[str, Any]:
    """Returns the body of a call: the prompt or the messages, the parameters, and the router's own fields."""
    document: dict[str, Any] = {}
    for path, value in _values(request, settings):
        *parents, last = path.split(".")
        place = document
        for key in parents:
            place = place.setdefault(key, {})
        place[last] = value
    return document


def _values(request: CallRequest, settings: BackendSettings) -> Iterator[tuple[str, Any]]:
    names, given = settings.fields, request.request
    yield names.model, request.endpoint
    if given is not None and given.messages is not None and names.messages is not None:
        yield names.messages, list(given.messages)
    elif settings.body == "openai":
        yield names.messages or "messages", [{"role": "user", "content": request.prompt}]
    else:
        yield names.prompt, request.prompt
    for name, value in given.parameters.items() if given is not None else ():
        yield names.parameters.get(name, name), value
    yield names.max_tokens, request.max_tokens
    yield names.request_id, str(request.call_id)
    yield names.tokens_reserved, request.reserved_tokens
