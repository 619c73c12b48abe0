"""Client of a real Redis whose clock the test controls."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from redis.exceptions import NoScriptError, ResponseError

from local.redis import RedisServer

CLOCK = "redis.call('TIME')"
OUR_CLOCK = "redis.call('HMGET', 'clock', 'seconds', 'micros')"
Reply = Any


def with_our_clock(script: str) -> str:
    """Returns the script with its single read of Redis's clock replaced."""
    assert script.count(CLOCK) == 1
    return script.replace(CLOCK, OUR_CLOCK)


class Connection:
    """Blocking connection, with round trips of about 30 microseconds."""

    def __init__(self, server: RedisServer) -> None:
        self.server = server
        self._socket = socket.create_connection(("127.0.0.1", server.port), timeout=30)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._replies = self._socket.makefile("rb")

    def close(self) -> None:
        self._replies.close()
        self._socket.close()

    def receives(self, seconds: float) -> bool:
        """Whether another message arrives within `seconds`."""
        self._socket.settimeout(seconds)
        try:
            return bool(self._socket.recv(1, socket.MSG_PEEK))
        except TimeoutError:
            return False

    def ask(self, *commands: tuple[bytes | str | int, ...]) -> Reply:
        """Sends the commands in one pipeline, and returns the last reply."""
        parts: list[bytes] = []
        for command in commands:
            parts.append(b"*%d\r\n" % len(command))
            for word in command:
                text = word if isinstance(word, bytes) else str(word).encode()
                parts.append(b"$%d\r\n%b\r\n" % (len(text), text))
        self._socket.sendall(b"".join(parts))
        replies = [self._reply() for _ in commands]
        for reply in replies:
            if isinstance(reply, Exception):
                raise reply
        return replies[-1]

    def _reply(self) -> Reply:
        line = self._replies.readline()
        kind, rest = line[:1], line[1:-2]
        if kind == b"$":
            size = int(rest)
            return None if size < 0 else self._replies.read(size + 2)[:-2]
        if kind == b"*":
            return [self._reply() for _ in range(int(rest))]
        if kind == b":":
            return int(rest)
        if kind == b"-":
            text = rest.decode(errors="replace")
            return NoScriptError(text) if text.startswith("NOSCRIPT") else ResponseError(text)
        return rest


@dataclass
class ScriptCall:
    """One call of the script, at true time `at`, with its reply."""

    at: int
    verb: str
    arguments: tuple[bytes | str, ...]
    reply: Reply


@dataclass
class ScriptRedis:
    """The part of a client that `RedisScript` uses. `wall` is Redis's clock; `travel` passes transit time."""

    connection: Connection
    wall: Callable[[], int]
    now: Callable[[], int]
    travel: Callable[[], None]
    calls: list[ScriptCall] = field(default_factory=list)
    run: int = 1
    _clock_set_to: int = -1

    async def execute_command(self, *command: Any, **_options: Any) -> Reply:
        if command[0] == "INFO":
            return {"run_id": f"run{self.run}"}
        if command[0] != "EVALSHA":
            return self.connection.ask((*command[0].split(), *command[1:]))
        self.travel()
        wall = self.wall()
        commands = [command]
        if wall != self._clock_set_to:
            seconds, rest = divmod(wall, 1_000_000)
            commands.insert(0, ("HSET", "clock", "seconds", seconds, "micros", rest))
        reply = self.connection.ask(*commands)
        self._clock_set_to = wall
        self.calls.append(ScriptCall(self.now(), command[4], command[5:], reply))
        self.travel()
        return reply

    def do(self, *command: bytes | str | int) -> Reply:
        """Runs any command, bypassing the limiter."""
        self._clock_set_to = -1
        return self.connection.ask(command)
