"""Forwards calls to an OpenAI-compatible provider's /chat/completions."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import aiohttp
from typing_extensions import Self

from models_backend.completion import (
    Completion,
    ProviderRefusal,
    completion_of,
    completion_of_events,
    not_to_be_had,
    refusal_of,
)
from models_backend.settings import ProviderSettings

LARGEST_ANSWER_BYTES = 16 * 1024 * 1024
LARGEST_ERROR_BYTES = 64 * 1024
LARGE_REPLY_BYTES = 256 * 1024  # parsing more would block the event loop for milliseconds
CONNECT_SECONDS = 10.0


class Provider:
    """A client of one provider, to be used as `async with`."""

    def __init__(self, settings: ProviderSettings) -> None:
        self._settings = settings
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        key = self._settings.key
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"Authorization": f"Bearer {key}"} if key else {},
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._session is not None:
            await self._session.close()

    def serves(self, model: str) -> bool:
        """Whether calls of this model are forwarded."""
        return model in self._settings.models

    async def complete(
        self, model: str, prompt: str, max_tokens: int, request: Mapping[str, Any] | None = None
    ) -> Completion:
        """The provider's answer. Raises ProviderRefusal with one line that contains no secret.

        `request` holds messages and parameters, which are passed on unchanged.

        Its status is the meaning for the stand-in's client: 429 and 503 to retry later, 503 also for what an
        operator has to fix (key, address), 404 for a missing model, 400, 413 and 422 for a refused prompt,
        504 for a timeout, else 502.
        """
        try:
            return await self._ask(self._request(model, prompt, max_tokens, request or {}))
        except ProviderRefusal as refusal:
            words = self._without_key(str(refusal))
            raise ProviderRefusal(refusal.status, words, refusal.retry_after) from None

    def _request(self, model: str, prompt: str, max_tokens: int, given: Mapping[str, Any]) -> dict[str, Any]:
        request: dict[str, Any] = {
            "messages": [{"role": "user", "content": prompt}],
            **given,
            "model": self._settings.models[model],
            "max_tokens": max_tokens,
        }
        if self._settings.stream:
            request.update(stream=True, stream_options={"include_usage": True})
        return request

    async def _ask(self, request: dict[str, Any]) -> Completion:
        if self._session is None:
            raise RuntimeError("Provider is not open: use it as `async with Provider(...)`")
        settings = self._settings
        silence = settings.silence_seconds if settings.stream else None
        timeout = aiohttp.ClientTimeout(
            total=settings.timeout_seconds, connect=CONNECT_SECONDS, sock_read=silence
        )
        url = f"{settings.base_url}/chat/completions"
        try:
            async with self._session.post(
                url, json=request, timeout=timeout, allow_redirects=False
            ) as response:
                if response.status != 200:
                    content = await _read(response, LARGEST_ERROR_BYTES)
                    raise refusal_of(response.status, response.headers.get("Retry-After"), content)
                content = await _read(response, LARGEST_ANSWER_BYTES)
                streamed = response.content_type == "text/event-stream"
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError) as error:
            raise _broken(error) from None
        if len(content) > LARGEST_ANSWER_BYTES:
            raise ProviderRefusal(502, "the provider's answer is too large")
        understand = completion_of_events if streamed else completion_of
        if len(content) > LARGE_REPLY_BYTES:
            return await asyncio.to_thread(understand, content)
        return understand(content)

    def _without_key(self, words: str) -> str:
        key = self._settings.key
        return words.replace(key, "***") if key else words


async def _read(response: aiohttp.ClientResponse, limit: int) -> bytes:
    """Reads slightly more than `limit` bytes at most; a longer result means there was more."""
    content = bytearray()
    async for chunk in response.content.iter_any():
        content += chunk
        if len(content) > limit:
            response.close()
            break
    return bytes(content)


# The first match decides, from specific to general.
_NOT_CONNECTED: tuple[tuple[type[Exception], str], ...] = (
    (aiohttp.ConnectionTimeoutError, "no connection to the provider in time: check LLAMA_API_BASE"),
    (aiohttp.ClientConnectorDNSError, "the provider's host is not known: check LLAMA_API_BASE"),
    (aiohttp.ClientSSLError, "no TLS connection to the provider: check LLAMA_API_BASE"),
    (aiohttp.ClientConnectorError, "the provider refuses connections: check LLAMA_API_BASE"),
)


def _broken(error: Exception) -> ProviderRefusal:
    """Explains an exception of the HTTP client."""
    for kind, words in _NOT_CONNECTED:
        if isinstance(error, kind):
            return not_to_be_had(words)
    if isinstance(error, asyncio.TimeoutError):
        return ProviderRefusal(504, "the provider did not answer in time")
    if isinstance(error, aiohttp.ClientPayloadError):
        return ProviderRefusal(502, "the provider broke off in the middle of its answer")
    return ProviderRefusal(502, f"the connection to the provider failed: {type(error).__name__}")
