"""Call requests for tests that use the backend client directly."""

from __future__ import annotations

import uuid

from router.models import CallRequest


def call_request(
    model: str = "phi-4",
    prompt: str = "why?",
    *,
    name: str = "a call",
    max_tokens: int = 256,
    reserved_tokens: int = 300,
    timeout_seconds: float = 10.0,
) -> CallRequest:
    """Builds a request whose id is `request_id(name)`."""
    call_id = uuid.UUID(request_id(name))
    return CallRequest(call_id, model, model, prompt, max_tokens, reserved_tokens, timeout_seconds)


def request_id(name: str) -> str:
    """Returns the id that the backend logs for the call of this name."""
    return str(uuid.uuid5(uuid.NAMESPACE_OID, name))
