"""One Lua script in Redis, tied to one run of the server: after a restart it is loaded anew, and knows it."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
import time
from collections.abc import Callable
from typing import Any

import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.client import NEVER_DECODE
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoScriptError, RedisError

from router.errors import LimiterUnavailable

log = logging.getLogger("router.limiter")

REDIS_ERRORS = (RedisError, OSError, asyncio.TimeoutError)
RUN_MARK = "@RUN@"
MOST_TRIES = 3
MOST_IDLE = 4  # connections kept at hand


def redis_client(url: str, *, seconds: float = 5.0, connections: int = 64) -> redis.asyncio.Redis:
    """A client that fails once a connection or a reply takes longer than `seconds`.

    It does not try again by itself, for up to ten times as long: whoever asks does, or has better to do.
    """
    return redis.asyncio.Redis.from_url(
        url, socket_timeout=seconds, socket_connect_timeout=seconds, max_connections=connections,
        retry=Retry(NoBackoff(), 0),
    )  # fmt: skip


class RedisScript:
    """Calls the script; whatever Redis fails with becomes LimiterUnavailable, and one line in the log.

    The text's `@RUN@` becomes the server's run id. A server that restarted does not know a script of an
    earlier run, so that nobody can ask it as if nothing had happened: its data may be an older copy.
    """

    def __init__(self, client: redis.asyncio.Redis, text: str) -> None:
        self._redis: Any = client
        self._text = text
        self._shas: dict[str, str] = {}  # by node; a plain client has one, without a name
        self._loading = asyncio.Lock()
        self._heads: dict[tuple[str, str], bytes] = {}
        self._away_since: float | None = None
        self._cluster = isinstance(client, redis.asyncio.RedisCluster)
        plain = type(client) is redis.asyncio.Redis and self._redis.connection is None
        self._pool: Any = self._redis.connection_pool if plain else None
        self._idle: list[Any] = []
        roomy = self._pool is not None and self._pool.max_connections >= 4 * MOST_IDLE
        self._most_idle = MOST_IDLE if roomy else 0

    async def call(self, key: str, verb: str, *arguments: bytes | str) -> Any:
        """The script's reply, undecoded. One round trip, once the script is loaded."""
        for _ in range(MOST_TRIES):
            try:
                node = await self._node(key)
                sha = self._shas.get(node) or await self._load(node)
                command = ("EVALSHA", sha, 1, key, verb, *arguments)
                reply = await self._redis.execute_command(*command, **{NEVER_DECODE: True})
            except NoScriptError:  # noqa: PERF203 - the normal sign of a restart; a round trip dwarfs it
                self._forget()
            except REDIS_ERRORS as error:
                raise self._unavailable(key, error) from error
            else:
                if self._away_since is not None:
                    self._back()
                return reply
        raise LimiterUnavailable(f"Redis forgets the limiter's script again and again; asked for {key}.")

    async def ask(self, key: str, verb: str, question: Callable[[], bytes]) -> Any:
        """As `call`, with a question that is put just before it is written to the socket.

        Where the client is a plain one, by a connection of its pool that is kept at hand: the client's own
        way costs more than all the rest of a decision.
        """
        if self._pool is None:
            return await self.call(key, verb, question())
        for _ in range(MOST_TRIES):
            try:
                head = self._heads.get((key, verb)) or self._head(key, verb, await self._load())
                connection = self._idle.pop() if self._idle else await self._pool.get_connection()
            except REDIS_ERRORS as error:
                raise self._unavailable(key, error) from error
            try:
                asked = question()
                await connection.send_packed_command(b"%b$%d\r\n%b\r\n" % (head, len(asked), asked))
                reply = await connection.read_response(disable_decoding=True)
            except NoScriptError:
                self._forget()
            except RedisConnectionError:  # Redis may have closed an idle connection, or be gone
                return await self.call(key, verb, question())
            except REDIS_ERRORS as error:
                await connection.disconnect()  # a replica's refusal: the next connection may find the primary
                raise self._unavailable(key, error) from error
            else:
                if self._away_since is not None:
                    self._back()
                return reply
            finally:
                await self._put_away(connection)
        raise LimiterUnavailable(f"Redis forgets the limiter's script again and again; asked for {key}.")

    async def _put_away(self, connection: Any) -> None:
        if connection.is_connected and len(self._idle) < self._most_idle:
            self._idle.append(connection)
        else:
            await self._pool.release(connection)

    async def close(self) -> None:
        """Give the connections back to the client's pool."""
        self._most_idle = 0
        while self._idle:
            await self._pool.release(self._idle.pop())

    def _head(self, key: str, verb: str, sha: str) -> bytes:
        """The packed command up to its last argument."""
        parts = [part.encode() for part in ("EVALSHA", sha, "1", key, verb)]
        packed = b"".join(b"$%d\r\n%b\r\n" % (len(part), part) for part in parts)
        head = self._heads[key, verb] = b"*%d\r\n%b" % (len(parts) + 1, packed)
        return head

    def _forget(self) -> None:
        self._shas.clear()
        self._heads.clear()

    async def _node(self, key: str) -> str:
        if not self._cluster:
            return ""
        await self._redis.initialize()
        return str(self._redis.get_node_from_key(key).name)

    async def _load(self, node: str = "") -> str:
        async with self._loading:
            if node in self._shas:
                return self._shas[node]
            there = {"target_nodes": self._redis.get_node(node_name=node)} if node else {}
            run = await self._run_id(there)
            text = self._text.replace(RUN_MARK, run)
            await self._redis.execute_command("SCRIPT LOAD", text, **there)
            if await self._run_id(there) != run:
                raise RedisError("Redis restarted while the limiter's script was loaded: ask again.")
            sha = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()
            self._shas[node] = sha
            return sha

    async def _run_id(self, there: dict[str, Any]) -> str:
        info = await self._redis.execute_command("INFO", "server", **there)
        return re.sub(r"[^0-9a-zA-Z]", "", str(info.get("run_id", "")))

    def _unavailable(self, key: str, error: BaseException) -> LimiterUnavailable:
        what = f"{type(error).__name__}: {error}"
        if self._away_since is None:
            self._away_since = time.monotonic()
            log.warning("Redis cannot decide (%s), so nothing is sent; going on as soon as it can", what)
        return LimiterUnavailable(f"Redis could not decide about {key}, so nothing is sent: {what}")

    def _back(self) -> None:
        seconds = time.monotonic() - (self._away_since or 0.0)
        self._away_since = None
        log.info("Redis decides again, after %.1f s", seconds)
