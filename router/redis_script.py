"""One Lua script in Redis, tied to one run of the server: after a restart it is loaded anew, and knows it."""

from __future__ import annotations

import asyncio
import hashlib
import re
from typing import Any

import redis.asyncio
from redis.client import NEVER_DECODE
from redis.exceptions import NoScriptError, RedisError

from router.errors import LimiterUnavailable

REDIS_ERRORS = (RedisError, OSError, asyncio.TimeoutError)
RUN_MARK = "@RUN@"
MOST_TRIES = 3


class RedisScript:
    """Calls the script; whatever Redis fails with becomes LimiterUnavailable.

    The text's `@RUN@` becomes the server's run id. A server that restarted does not know a script of an
    earlier run, so that nobody can ask it as if nothing had happened: its data may be an older copy.
    """

    def __init__(self, redis: redis.asyncio.Redis, text: str) -> None:
        self._redis: Any = redis
        self._text = text
        self._sha: str | None = None
        self._loading = asyncio.Lock()

    async def call(self, key: str, verb: str, *arguments: bytes | str) -> Any:
        """The script's reply, undecoded. One round trip, once the script is loaded."""
        for _ in range(MOST_TRIES):
            sha = self._sha or await self._load(key)
            try:
                command = ("EVALSHA", sha, 1, key, verb, *arguments)
                return await self._redis.execute_command(*command, **{NEVER_DECODE: True})
            except NoScriptError:  # the normal sign of a restart
                self._sha = None
            except REDIS_ERRORS as error:
                raise _unavailable(key, error) from error
        raise LimiterUnavailable(f"Redis forgets the limiter's script again and again; asked for {key}.")

    async def _load(self, key: str) -> str:
        async with self._loading:
            if self._sha is not None:
                return self._sha
            try:
                run = await self._run_id()
                text = self._text.replace(RUN_MARK, run)
                await self._redis.script_load(text)
                same = await self._run_id() == run
            except REDIS_ERRORS as error:
                raise _unavailable(key, error) from error
            if not same:
                raise LimiterUnavailable("Redis restarted while the limiter's script was loaded: ask again.")
            self._sha = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()
            return self._sha

    async def _run_id(self) -> str:
        info = await self._redis.info("server")
        return re.sub(r"[^0-9a-zA-Z]", "", str(info.get("run_id", "")))


def _unavailable(key: str, error: BaseException) -> LimiterUnavailable:
    return LimiterUnavailable(
        f"Redis could not decide about {key}, so nothing is sent: {type(error).__name__}: {error}"
    )
