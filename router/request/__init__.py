"""Requests to models: reads and validates OpenAI-compatible bodies, for every entrance alike."""

from __future__ import annotations

from router.request.capabilities import CAPABILITIES, TEXT_CAPABILITIES, Unsupported, check_supported
from router.request.conversation import Conversation, conversation_of
from router.request.errors import RequestError
from router.request.messages import MAX_MESSAGES, MAX_PARTS, check_messages
from router.request.model_request import ModelRequest, capability_of, read_request
from router.request.parameters import Parameters

__all__ = [
    "CAPABILITIES",
    "MAX_MESSAGES",
    "MAX_PARTS",
    "TEXT_CAPABILITIES",
    "Conversation",
    "ModelRequest",
    "Parameters",
    "RequestError",
    "Unsupported",
    "capability_of",
    "check_messages",
    "check_supported",
    "conversation_of",
    "read_request",
]
