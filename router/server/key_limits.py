"""Applies the limits of API keys to the requests of their clients."""

from __future__ import annotations

import asyncio

from router.answering import Router
from router.server.api_keys import ApiKeys
from router.settings import RouterConfig
from router.traffic import TrafficTarget


class KeyLimits:
    """Follows the keys' file. A limit that `clients.<name>` of models.yaml sets goes before that of a key."""

    def __init__(self, router: Router, keys: ApiKeys) -> None:
        self._router = router
        self._keys = keys
        self._applied: dict[str, TrafficTarget] = {}

    async def follow(self) -> None:
        """Reads the keys if their file has changed, and applies changed limits.

        Raises ConfigError or LimiterError; what was not applied is tried again by the next call.
        """
        await asyncio.to_thread(self._keys.reload)
        config = self._router.config
        wanted = {name: limit for name, limit in self._keys.limits().items() if not _has_limit(config, name)}
        for client in {*wanted, *self._applied}:
            limit = wanted.get(client)
            if limit == self._applied.get(client):
                continue
            await self._router.set_client_limit(client, limit or _configured(config, client))
            self._applied.pop(client, None)
            if limit is not None:
                self._applied[client] = limit


def _has_limit(config: RouterConfig, client: str) -> bool:
    return client in config.clients and "limit" in config.clients[client].model_fields_set


def _configured(config: RouterConfig, client: str) -> TrafficTarget | None:
    line = config.client(client).limit
    return None if line is None else TrafficTarget.parse(line)
