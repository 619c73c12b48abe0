"""`router clients`: usage, limits and forecasts of each client, from sums of the call log."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import redis.asyncio
import yaml

from local.redis import RedisServer
from router.database import connect, rows
from router.limiter import PastCall, TrafficLimiter
from router.settings.environment import DEFAULT_CONFIG_FOLDER
from router.settings.models import DISCOVERED
from tests.support.command_line import CommandLine

Ask = Callable[..., list[dict[str, Any]]]
CALLS = """
INSERT INTO model_calls (call_id, model, category, client, started_at, finished_at, outcome, tokens, cost)
SELECT (left(first_call_id(at)::text, 13) || '-7' || substr(r, 16, 3) || right(r, 18))::uuid,
       'phi-4', 'general', %s, at, CASE WHEN %s::text IS NOT NULL THEN at END, %s, 100, 0.01
  FROM (SELECT clock_timestamp() - make_interval(secs => %s) AS at, gen_random_uuid()::text AS r
          FROM generate_series(1, %s)) AS made"""


@pytest.fixture
def ask(database: str) -> Ask:
    def run(statement: str, *arguments: Any) -> list[dict[str, Any]]:
        with connect(database) as connection:
            return rows(connection, statement, arguments)

    return run


@pytest.fixture
def add(ask: Ask) -> Callable[..., None]:
    """Adds ended calls of a client that began so many seconds ago."""

    def run(client: str, number: int, *, ago: float = 60, outcome: str | None = "answered") -> None:
        ask(CALLS, client, outcome, outcome, ago, number)

    return run


@pytest.fixture
def router(database: str, tmp_path: Path) -> CommandLine:
    folder = tmp_path / "config"
    shutil.copytree(DEFAULT_CONFIG_FOLDER, folder, ignore=shutil.ignore_patterns(DISCOVERED))
    models = yaml.safe_load((folder / "models.yaml").read_text())
    models["clients"] = {
        "alice": {"weight": 3, "limit": "600/h, 12k tokens/h"}, "default": {"limit": "100/min"},
    }  # fmt: skip
    (folder / "models.yaml").write_text(yaml.safe_dump(models))
    return CommandLine({"ROUTER_DATABASE_URL": database, "ROUTER_CONFIG": str(folder)})


@pytest.mark.parametrize("summed", [False, True])
def test_usage_counts_each_ended_call_once(
    router: CommandLine, ask: Ask, add: Callable[..., None], summed: bool
) -> None:
    """Whether the periodic job has summed the calls, a part of them, or none."""
    add("bob", 20, ago=2 * 3600)
    add("alice", 5, ago=2000)
    if summed:
        assert ask("SELECT sum_client_usage(1000) AS n") == [{"n": 24 * 12 + 1}]
    add("alice", 10)
    add("alice", 4, outcome="error")
    add("alice", 3, outcome="unsent")
    add("alice", 2, outcome=None)
    found = router("clients", "--json").json
    alice, bob = found["alice"], found["bob"]
    assert (alice["hour"]["calls"], alice["hour"]["answered"], alice["hour"]["failed"]) == (19, 15, 4)
    assert (alice["day"]["tokens"], alice["day"]["cost_usd"]) == (1900, pytest.approx(0.19))
    assert (bob["hour"]["calls"], bob["day"]["calls"]) == (0, 20)
    ask("UPDATE model_calls SET outcome = 'answered', finished_at = now() WHERE outcome IS NULL")
    ask("SELECT sum_client_usage(100)")
    assert router("clients", "--json").json["alice"]["day"]["calls"] == 21


def test_a_stretch_is_closed_once_all_of_its_calls_ended(ask: Ask, add: Callable[..., None]) -> None:
    add("alice", 3, ago=1000, outcome=None)
    ask("SELECT sum_client_usage(1000)")
    (open_one,) = ask(
        "SELECT at FROM client_usage_stretches WHERE NOT closed AND at < now() - interval '15 min'"
    )
    ask("UPDATE model_calls SET outcome = 'answered', finished_at = now()")
    ask(
        "UPDATE client_usage_stretches SET summed_at = now() - interval '10 minutes' WHERE at = %s",
        open_one["at"],
    )
    ask("SELECT sum_client_usage(100)")
    (row,) = ask("SELECT u.calls, s.closed FROM client_usage u JOIN client_usage_stretches s USING (at)")
    assert row == {"calls": 3, "closed": True}


def test_limits_show_use_and_pace(router: CommandLine, add: Callable[..., None]) -> None:
    add("alice", 60)
    add("carol", 30, ago=200)
    found = router("clients", "--json").json
    requests, tokens = found["alice"]["limits"]
    assert requests == {
        "limit": "600/h", "kind": "requests", "used": 60, "allowed": 600, "forecast": pytest.approx(60),
        "exact": False,
    }  # fmt: skip
    assert (tokens["limit"], tokens["used"], tokens["allowed"]) == ("12k tokens/h", 6000, 12_000)
    (minute,) = found["carol"]["limits"]
    assert (minute["limit"], minute["forecast"]) == ("100/min", pytest.approx(0.5))
    shown = " ".join(router("clients").out.split())
    assert "600/h: 60 -> 60" in shown


async def no_calls(_name: str, _seconds: float) -> list[PastCall]:
    return []


async def reserve(url: str, clients: dict[str, str]) -> None:
    """Sets the clients' limits and makes two calls of $0.20 for each of them."""
    client = redis.asyncio.Redis.from_url(url)
    async with TrafficLimiter(client, no_calls, client_history=no_calls) as limiter:
        await limiter.set_target("phi-4", "100000/s, burst")
        for name, limit in clients.items():
            await limiter.set_client_limit(name, limit)
            for _ in range(2):
                assert await limiter.reserve("phi-4", cost=200_000, client=name)
    await client.aclose()


def test_use_is_the_limiters_also_of_limits_that_keys_set(
    router: CommandLine, add: Callable[..., None], redis_server: RedisServer, redis_client: object
) -> None:
    add("alice", 60)
    add("dave", 10)
    limits = {"alice": "600/h, 12k tokens/h", "dave": "100/min, $1/day, $5/calendar month"}
    asyncio.run(reserve(redis_server.url, limits))
    config = yaml.safe_load((Path(router.environment["ROUTER_CONFIG"]) / "models.yaml").read_text())
    del config["clients"]["default"]
    (Path(router.environment["ROUTER_CONFIG"]) / "models.yaml").write_text(yaml.safe_dump(config))
    found = router("clients", "--json", "--redis", redis_server.url).json
    assert [(one["limit"], one["used"], one["exact"]) for one in found["alice"]["limits"]] == [
        ("600/h", 2, True), ("12k tokens/h", 0, True),
    ]  # fmt: skip
    dave = {one["limit"]: one for one in found["dave"]["limits"]}
    assert (dave["$1/d"]["used"], dave["$1/d"]["allowed"]) == (0.4, 1.0)
    assert dave["$1/d"]["forecast"] == pytest.approx(24 * 0.1)  # 10 calls of $0.01 in the last hour
    assert dave["$5/calendar month"]["forecast"] >= 0.4
    without = router("clients", "--json", "--redis", "redis://127.0.0.1:1").json
    assert without["alice"]["limits"][0]["used"] == 60
    assert without["dave"]["limits"] == []


def test_old_usage_is_deleted(ask: Ask) -> None:
    ask("INSERT INTO client_usage_stretches SELECT now() - make_interval(days => d), now(), true"
        " FROM unnest(ARRAY[1, 31, 33]) AS d")  # fmt: skip
    assert ask("SELECT prune_client_usage(32) AS n") == [{"n": 1}]


def test_shares_of_queue_and_claims(router: CommandLine, ask: Ask) -> None:
    """alice weighs 3, others 1; the claims are shared by weight, whatever the backlog."""
    ask("INSERT INTO tasks (prompt, client) VALUES ('p', 'alice'), ('p', 'bob'), ('p', 'bob'), ('p', 'bob')")
    found = router("clients", "--json").json
    assert {name: one["unsolved"] for name, one in found.items()} == {"alice": 1, "bob": 3}
    assert {name: one["queue_share"] for name, one in found.items()} == {"alice": 0.25, "bob": 0.75}
    assert {name: one["weight_share"] for name, one in found.items()} == {"alice": 0.75, "bob": 0.25}
