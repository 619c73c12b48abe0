"""`python -m models_backend --check`: sends one small prompt to each real model."""

from __future__ import annotations

import sys
import time

from models_backend.completion import ProviderRefusal
from models_backend.provider import Provider
from models_backend.settings import ProviderSettings
from router.errors import printable

QUESTION = "Answer with the one word: yes"
CHECK_TOKENS = 256  # a reasoning model spends some before its first word


async def check(settings: ProviderSettings) -> int:
    """Prints one line per real model. Exit status 0 if all answered, else 1."""
    key = "with a key" if settings.key else "without a key (LLAMA_API_KEY is not set)"
    _say(f"{settings.base_url}, {key}{', streaming' if settings.stream else ''}")
    async with Provider(settings) as provider:
        well = [await _check_one(provider, name, theirs) for name, theirs in settings.models.items()]
    if not well:
        _say("no model is real: name them in LLAMA_MODELS=name=provider-model,...")
    return 0 if well and all(well) else 1


async def _check_one(provider: Provider, name: str, theirs: str) -> bool:
    began = time.monotonic()
    try:
        found = await provider.complete(name, QUESTION, CHECK_TOKENS)
    except ProviderRefusal as refusal:
        _say(f"{name} = {theirs}: {refusal.status} {refusal}")
        return False
    words = " ".join(found.text.split())[:60]
    tokens = f"{found.prompt_tokens} + {found.completion_tokens} tokens"
    _say(f"{name} = {theirs}: answered {words!r} in {time.monotonic() - began:.1f} s, {tokens}")
    return True


def _say(line: str) -> None:
    sys.stdout.write(f"{printable(line, one_line=True)}\n")
