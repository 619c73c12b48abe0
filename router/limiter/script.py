"""Loads and calls the Lua script, one copy per run of the Redis server.

Decisions (`call_timed`) bypass redis-py's client and write RESP to a connection of its pool that is kept at
hand. With three limits a decision takes 88 us of CPU instead of 141 us over `execute_command`. All other
calls use the client.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.client import NEVER_DECODE
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoScriptError, RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError

from router.errors import LimiterUnavailable
from router.settings import RedisAddress

log = logging.getLogger("router.limiter")

Requests = tuple[bytes, ...]  # one per key
REDIS_ERRORS = (RedisError, OSError, asyncio.TimeoutError)
RUN_ID = "@RUN@"
MAX_TRIES = 3
MAX_IDLE = 4  # connections kept at hand
PROBE_KEY = "router:{probe}"

# Error code -> cause of the outage, and what is the matter.
_CAUSES = {
    "READONLY": ("read_only", "is read-only"),
    "NOREPLICAS": ("read_only", "rejects writes: too few replicas"),
    "MISCONF": ("read_only", "rejects writes: it cannot save its data"),
    "MASTERDOWN": ("read_only", "is a replica without a primary"),
    "LOADING": ("loading", "is loading its data"),
    "OOM": ("out_of_memory", "is out of memory"),
    "NOPERM": ("forbidden", "forbids a command or key to its user (docs/limiter.md lists what is needed)"),
    "NOAUTH": ("forbidden", "requires a password"),
    "WRONGPASS": ("forbidden", "rejects the user or password"),
    "BUSY": ("busy", "is busy with another script"),
    "CLUSTERDOWN": ("failing", "is a cluster that is down"),
    "TRYAGAIN": ("failing", "is a cluster that moves the keys"),
    "CROSSSLOT": ("failing", "is a cluster: limits of clients need TrafficLimiter(one_slot=True)"),
    "MOVED": ("failing", "is a cluster, and ROUTER_REDIS_URL names one of its nodes only"),
    "ASK": ("failing", "is a cluster, and ROUTER_REDIS_URL names one of its nodes only"),
    "UNBLOCKED": ("failing", "changed its role"),
    "NOSCRIPT": ("failing", "drops the limiter's script: are there several servers behind its address?"),
}  # fmt: skip
_CODE = re.compile(rf"\b({'|'.join(_CAUSES)})\b")
_SAME_ON_RECONNECT = frozenset({"out_of_memory", "forbidden", "busy"})


@dataclass(frozen=True, slots=True)
class Outage:
    """Outage of Redis: its cause (see LimiterUnavailable), text, and when it began on the monotonic clock."""

    cause: str
    text: str
    since: float


def redis_client(url: str, *, seconds: float = 5.0, connections: int = 32) -> redis.asyncio.Redis:
    """Returns a client that fails once a connection or a reply takes longer than `seconds`.

    It does not retry by itself, which would take up to ten times as long: callers decide whether to. Calls
    beyond its number of connections wait for one.
    """
    pool = redis.asyncio.BlockingConnectionPool.from_url(
        RedisAddress.parse(url).url, timeout=seconds, socket_timeout=seconds, socket_connect_timeout=seconds,
        max_connections=connections, retry=Retry(NoBackoff(), 0),
    )  # fmt: skip
    return redis.asyncio.Redis.from_pool(pool)


class RedisScript:
    """Calls the script. Errors of Redis become LimiterUnavailable, and one log line per outage.

    `@RUN@` in the `text` becomes the server's run id. A server that restarted does not know the script of an
    earlier run, so that its data, maybe an older copy, is never used as if nothing had happened. `sender`
    names this process in the notifications that the script publishes.
    """

    def __init__(self, client: redis.asyncio.Redis, text: str, *, sender: str) -> None:
        self.text = text
        self.sender = sender
        self._redis: Any = client
        self._hashes: dict[str, str] = {}  # by node; a plain client has one, without a name
        self._loading = asyncio.Lock()
        self._heads: dict[tuple[str, str, str | None], bytes] = {}
        self.outage: Outage | None = None
        self.on_reconnect: Callable[[], None] = lambda: None
        self.on_cluster = isinstance(client, redis.asyncio.RedisCluster)
        plain = type(client) is redis.asyncio.Redis and self._redis.connection is None
        self._pool: Any = self._redis.connection_pool if plain else None
        self._idle: list[Any] = []
        large = self._pool is not None and self._pool.max_connections >= 4 * MAX_IDLE
        self._max_idle = MAX_IDLE if large else 0

    async def call(self, key: str, verb: str, *arguments: bytes | str, second_key: str | None = None) -> Any:
        """Returns the script's reply, undecoded. One round trip, once the script is loaded."""
        keys = (key,) if second_key is None else (key, second_key)
        for tries in range(MAX_TRIES):
            try:
                node = await self._node(key)
                digest = self._hashes.get(node) or await self._load(node)
                command = ("EVALSHA", digest, len(keys), *keys, verb, *arguments)
                reply = await self._redis.execute_command(*command, **{NEVER_DECODE: True})
            except NoScriptError as error:  # noqa: PERF203 - expected after a restart
                await self._script_missing(key, error, tries)
            except REDIS_ERRORS as error:
                raise await self._unavailable(key, error) from error
            else:
                if self.outage is not None:
                    self._recovered()
                return reply
        raise AssertionError("unreachable: the last try raises")

    async def check_writable(self) -> None:
        """Writes a key that expires at once: reads alone succeed on a replica, too."""
        try:
            await self._redis.set(PROBE_KEY, 1, px=1000)
        except REDIS_ERRORS as error:
            raise await self._unavailable(PROBE_KEY, error) from error

    async def call_timed(
        self, key: str, verb: str, request: Callable[[], Requests], second_key: str | None = None
    ) -> Any:
        """Calls the script with a request that is packed just before it is written to the socket.

        With a second key there is a request for each key. Uses the raw path on a plain client, and `call` on
        a cluster.
        """
        if self._pool is None:
            return await self.call(key, verb, *request(), second_key=second_key)
        for tries in range(MAX_TRIES):
            try:
                head = self._heads.get((key, verb, second_key)) or self._head(
                    key, verb, second_key, await self._load()
                )
                connection = self._idle.pop() if self._idle else await self._pool.get_connection()
            except REDIS_ERRORS as error:
                raise await self._unavailable(key, error) from error
            try:
                await connection.send_packed_command(_command(head, request()))
                reply = await connection.read_response(disable_decoding=True)
            except NoScriptError as error:
                if tries:
                    await connection.disconnect()
                await self._script_missing(key, error, tries)
            except RedisConnectionError:  # Redis closed an idle connection, or is down
                return await self.call(key, verb, *request(), second_key=second_key)
            except REDIS_ERRORS as error:
                await connection.disconnect()
                raise await self._unavailable(key, error) from error
            else:
                if self.outage is not None:
                    self._recovered()
                return reply
            finally:
                await self._put_away(connection)
        raise AssertionError("unreachable: the last try raises")

    async def close(self) -> None:
        """Returns the connections to the client's pool."""
        self._max_idle = 0
        while self._idle:
            await self._pool.release(self._idle.pop())

    async def _put_away(self, connection: Any) -> None:
        if connection.is_connected and len(self._idle) < self._max_idle:
            self._idle.append(connection)
        else:
            await self._pool.release(connection)

    def _head(self, key: str, verb: str, second_key: str | None, digest: str) -> bytes:
        """Packs the command up to its requests, of which there is one per key."""
        keys = (key,) if second_key is None else (key, second_key)
        parts = [part.encode() for part in ("EVALSHA", digest, str(len(keys)), *keys, verb)]
        packed = b"".join(b"$%d\r\n%b\r\n" % (len(part), part) for part in parts)
        head = self._heads[key, verb, second_key] = b"*%d\r\n%b" % (len(parts) + len(keys), packed)
        return head

    def _forget(self) -> None:
        self._hashes.clear()
        self._heads.clear()

    async def _node(self, key: str) -> str:
        if not self.on_cluster:
            return ""
        await self._redis.initialize()
        return str(self._redis.get_node_from_key(key).name)

    async def _load(self, node: str = "") -> str:
        async with self._loading:
            if node in self._hashes:
                return self._hashes[node]
            target = {"target_nodes": self._redis.get_node(node_name=node)} if node else {}
            if self._pool is None:
                digest = await self._load_over(self._redis, target)
            else:  # over one connection: the script's run id must be that of the server that gets it
                async with self._redis.client() as connection:
                    digest = await self._load_over(connection, target)
            self._hashes[node] = digest
            return digest

    async def _load_over(self, client: Any, target: dict[str, Any]) -> str:
        run = await _run_id(client, target)
        text = self.text.replace(RUN_ID, run)
        await client.execute_command("SCRIPT LOAD", text, **target)
        if await _run_id(client, target) != run:
            raise RedisError("Redis restarted while the limiter's script was loaded. Retry.")
        return hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()

    async def _script_missing(self, key: str, error: NoScriptError, tries: int) -> None:
        """Loads the script again; if it is missing right after, the connections lead to different servers."""
        self._forget()
        if tries == MAX_TRIES - 1:
            raise await self._unavailable(key, error) from error
        if tries:
            await self._drop_connections()
            self.on_reconnect()

    async def _unavailable(self, key: str, error: BaseException) -> LimiterUnavailable:
        cause, what = _diagnosis(error)
        text = f"Redis {what}: {type(error).__name__}: {error}"
        if self.outage is None:
            log.warning("nothing is sent until Redis recovers: %s", text)
        if self.outage is None or self.outage.cause != cause:
            since = time.monotonic() if self.outage is None else self.outage.since
            self.outage = Outage(cause, text, since)
        if cause not in _SAME_ON_RECONNECT:
            await self._drop_connections()
        return LimiterUnavailable(f"{text.rstrip('.')}. Nothing is sent ({key}).", cause)

    async def _drop_connections(self) -> None:
        """Closes all idle connections: new ones may reach another server, e.g. after a failover."""
        self._forget()
        while self._idle:
            connection = self._idle.pop()
            await connection.disconnect(nowait=True)
            await self._pool.release(connection)
        if self._pool is not None:
            await self._pool.disconnect(inuse_connections=False)

    def _recovered(self) -> None:
        outage, self.outage = self.outage, None
        if outage is not None:
            log.info("Redis recovered after %.1f s", time.monotonic() - outage.since)
            self.on_reconnect()


def _command(head: bytes, requests: Requests) -> bytes:
    first = requests[0]
    if len(requests) == 1:
        return b"%b$%d\r\n%b\r\n" % (head, len(first), first)
    return b"".join([head, *(b"$%d\r\n%b\r\n" % (len(one), one) for one in requests)])


async def _run_id(client: Any, target: dict[str, Any]) -> str:
    info = await client.execute_command("INFO", "server", **target)
    return re.sub(r"[^0-9a-zA-Z]", "", str(info.get("run_id", "")))


def _diagnosis(error: BaseException) -> tuple[str, str]:
    """Returns the cause of an outage, and what is the matter with Redis."""
    code = getattr(error, "status_code", None)
    found = _CODE.search(str(code)) or _CODE.search(str(error))  # errors inside a script: only in the text
    if found is not None:
        return _CAUSES[found.group()]
    if isinstance(error, (asyncio.TimeoutError, RedisTimeoutError)):
        return "hung", "does not answer"
    if isinstance(error, (RedisConnectionError, OSError)):
        return "away", "is unavailable"
    return "failing", "rejects the limiter's commands"
