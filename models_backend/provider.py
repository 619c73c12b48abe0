"""Real models: calls forwarded to an OpenAI-compatible provider's /chat/completions."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import Any

import aiohttp
from typing_extensions import Self

from models_backend.settings import ProviderSettings

LARGEST_ANSWER_BYTES = 16 * 1024 * 1024
CONNECT_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Completion:
    """What the provider answered; tokens are None where it did not count them."""

    text: str
    prompt_tokens: int | None
    completion_tokens: int | None


class ProviderRefusal(Exception):  # noqa: N818 - a refusal is an answer, too
    """The provider gave no answer; carries the status and words for our own client, never the key."""

    def __init__(self, status: int, message: str, retry_after: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after = retry_after


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
            timeout=aiohttp.ClientTimeout(total=self._settings.timeout_seconds, connect=CONNECT_SECONDS),
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._session is not None:
            await self._session.close()

    def serves(self, model: str) -> bool:
        """Whether calls of this model are forwarded."""
        return model in self._settings.models

    async def complete(self, model: str, prompt: str, max_tokens: int) -> Completion:
        """The provider's answer, or ProviderRefusal: 429 and 503 as they came, 504 if late, else 502."""
        if self._session is None:
            raise RuntimeError("Provider is not open: use it as `async with Provider(...)`")
        request = {
            "model": self._settings.models[model],
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": max_tokens,
        }
        url = f"{self._settings.base_url}/chat/completions"
        try:
            async with self._session.post(url, json=request, allow_redirects=False) as response:
                content = await _read(response)
                if response.status != 200:
                    raise _refusal(response.status, response.headers.get("Retry-After"), content)
        except asyncio.TimeoutError as error:
            raise ProviderRefusal(504, "the provider did not answer in time") from error
        except (aiohttp.ClientError, OSError) as error:
            raise ProviderRefusal(
                502, f"the connection to the provider failed: {type(error).__name__}"
            ) from error
        return _completion(content)


async def _read(response: aiohttp.ClientResponse) -> bytes:
    content = bytearray()
    async for chunk in response.content.iter_any():
        content += chunk
        if len(content) > LARGEST_ANSWER_BYTES:
            raise ProviderRefusal(502, "the provider's answer is too large")
    return bytes(content)


def _refusal(status: int, retry_after: str | None, content: bytes) -> ProviderRefusal:
    if status in {401, 403}:
        return ProviderRefusal(502, f"the provider refuses our key ({status}): check LLAMA_API_KEY")
    if status in {429, 503}:
        return ProviderRefusal(status, f"the provider answered {status}", retry_after)
    if status in {400, 404, 413, 422}:
        return ProviderRefusal(status, f"the provider answered {status}: {_words(content)}")
    return ProviderRefusal(502, f"the provider answered {status}")


def _words(content: bytes) -> str:
    try:
        found: Any = json.loads(content)["error"]
        return str(found.get("message", "") if isinstance(found, dict) else found)[:200]
    except (ValueError, KeyError, TypeError):
        return "(no reason given)"


def _completion(content: bytes) -> Completion:
    try:
        document = json.loads(content)
        text = document["choices"][0]["message"]["content"]
        usage = document.get("usage") or {}
        counts = usage.get("prompt_tokens"), usage.get("completion_tokens")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise ProviderRefusal(502, "the provider's answer is not a chat completion") from error
    if not isinstance(text, str):
        raise ProviderRefusal(502, "the provider's answer holds no text")
    return Completion(text, *(count if isinstance(count, int) else None for count in counts))
