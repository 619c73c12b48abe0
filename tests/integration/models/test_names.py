"""Invalid model names and targets, at every place where they enter."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from pathlib import Path

import psycopg2
import pytest
import redis.asyncio
import yaml

from local.redis import RedisServer
from router.database import connect, open_pool, rows
from router.errors import ConfigError, InputError
from router.limiter.limiter import TrafficLimiter
from router.models.targets import TargetSync
from router.settings.environment import DEFAULT_CONFIG_FOLDER
from router.settings.router import load_config
from tests.support.command_line import CommandLine

LONG = "m" * 1024
BAD_NAMES = {
    "space": "my model",
    "leading space": " phi-4",
    "brace": "phi}-4",
    "braces": "{phi-4}",
    "colon": "router:phi-4",
    "slash": "meta/llama",
    "newline inside": "phi\n-4",
    "newline at the end": "phi-4\n",
    "nul": "phi\0-4",
    "quote": "phi'-4",
    "unicode": "phí-4",
    "another script's digit": "phi-٤",
    "empty": "",
    "hyphen first": "-phi",
    "101 characters": "m" * 101,
    "1 kB": LONG,
}
bad_name = pytest.mark.parametrize("name", BAD_NAMES.values(), ids=BAD_NAMES.keys())
LOOSE = "10000/min never binds: 1/s is always tighter."


@pytest.fixture
async def limiter(redis_client: redis.asyncio.Redis) -> AsyncIterator[TrafficLimiter]:
    async with TrafficLimiter(redis_client) as limiter:
        yield limiter


@pytest.fixture
def router(database: str, redis_server: RedisServer) -> CommandLine:
    return CommandLine({"ROUTER_DATABASE_URL": database, "ROUTER_REDIS_URL": redis_server.url})


# Names


@bad_name
async def test_limiter_rejects_a_name_without_a_command_to_redis(
    limiter: TrafficLimiter, redis_client: redis.asyncio.Redis, name: str
):
    for command in (
        lambda: limiter.set_target(name, "5/min"),
        lambda: limiter.reserve(name),
        lambda: limiter.acquire(name, timeout_seconds=1),
        lambda: limiter.wait_until_available(name),
        lambda: limiter.cool_down(name, 5, "429"),
        lambda: limiter.snapshot([name]),
    ):
        with pytest.raises(InputError, match="is not a valid model name: letters, digits") as caught:
            await command()
        assert len(str(caught.value)) < 250
        assert "\n" not in str(caught.value)
    assert await redis_client.dbsize() == 0


@bad_name
def test_config_rejects_a_name_and_names_the_file(tmp_path: Path, name: str):
    config = yaml.safe_load((DEFAULT_CONFIG_FOLDER / "models.yaml").read_text())
    some = next(iter(config["models"]))
    config["models"] = {**config["models"], name: config["models"][some]}
    (tmp_path / "models.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(ConfigError, match="not a model name: letters, digits") as caught:
        load_config(tmp_path)
    assert str(tmp_path / "models.yaml") in str(caught.value)
    assert len(str(caught.value)) < 350 + len(str(tmp_path))


def test_roster_rejects_a_name(database: str):
    copied = (
        "INSERT INTO roster (model, endpoint, state, source, context_tokens, max_tokens, timeout_seconds,"
        " input_price, output_price, default_target) SELECT %s, endpoint, state, source, context_tokens,"
        " max_tokens, timeout_seconds, input_price, output_price, default_target FROM roster LIMIT 1"
    )
    for name in [name for name in BAD_NAMES.values() if "\0" not in name]:  # Postgres has no NUL in text
        with (
            connect(database) as connection,
            pytest.raises(psycopg2.errors.CheckViolation, match="roster_model"),
        ):
            rows(connection, copied, (name,))
    with connect(database) as connection:
        rows(connection, copied, ("m" * 100,))


@pytest.mark.parametrize("name", ["my model", "{phi-4}", "router:phi-4", "phi\n-4", LONG])
def test_command_line_reports_an_unknown_model(router: CommandLine, name: str):
    result = router("traffic", name, "5/min")
    assert (result.code, result.out) == (1, "")
    assert result.err.startswith("There is no model ") or "There is no model" in result.err
    assert "Traceback" not in result.err
    assert len(result.err) < 700


async def test_variable_with_an_invalid_name_does_not_block_others(
    database: str, limiter: TrafficLimiter, caplog: pytest.LogCaptureFixture
):
    pool = await open_pool(database, connections=1)
    try:
        targets = TargetSync(pool, limiter)
        lines: dict[str, str | None] = {"my\nmodel": "9/s", LONG: "8/s", "phi-4": "7/s"}
        with caplog.at_level(logging.WARNING, "router.traffic"):
            await targets.apply(lines, version=10)
            await targets.apply(lines, version=11)
        assert (await limiter.snapshot(["phi-4"]))["phi-4"].target == "7/s"
        assert await pool.fetchval("SELECT target FROM newest_targets WHERE model = 'phi-4'") == "7/s"
        assert set(targets.errors) == {"my\nmodel", LONG}
        messages = [record.getMessage() for record in caplog.records]
        assert len(messages) == 2  # once per Variable and not per read
        assert all(
            "is not a valid model name" in line and "\n" not in line and len(line) < 400 for line in messages
        )
    finally:
        await pool.close()


# Targets


@pytest.mark.parametrize(
    "line", ["5/mn", "5/s\0", "\ud800/s", "7" * 100_000], ids=lambda line: repr(line)[:12]
)
async def test_invalid_line_is_reported_and_the_last_target_stays(
    database: str, limiter: TrafficLimiter, caplog: pytest.LogCaptureFixture, line: str
):
    pool = await open_pool(database, connections=1)
    try:
        targets = TargetSync(pool, limiter)
        await targets.apply({"phi-4": "7/s"}, version=10)
        with caplog.at_level(logging.WARNING, "router.traffic"):
            await targets.apply({"phi-4": line, "gpt-4o-mini": "3/s"}, version=11)
        assert (await limiter.snapshot(["phi-4"]))["phi-4"].target == "7/s"
        assert (await limiter.snapshot(["gpt-4o-mini"]))["gpt-4o-mini"].target == "3/s"
        assert await pool.fetchval("SELECT count(*) FROM traffic_troubles WHERE model = 'phi-4'") == 1
        (message,) = [record.getMessage() for record in caplog.records]
        assert message.startswith("traffic.phi-4: ")
        assert len(message) < 400
    finally:
        await pool.close()


async def test_limit_that_never_binds_is_reported_wherever_the_target_is_shown(
    database: str, limiter: TrafficLimiter, router: CommandLine, caplog: pytest.LogCaptureFixture
):
    pool = await open_pool(database, connections=1)
    try:
        targets = TargetSync(pool, limiter)
        with caplog.at_level(logging.WARNING, "router.traffic"):
            for version in (10, 11):
                await targets.apply({"phi-4": "10000/min, 1/s", "gpt-4o-mini": "60/min"}, version=version)
    finally:
        await pool.close()
    assert [record.getMessage() for record in caplog.records] == [f"traffic.phi-4: {LOOSE}"]
    status, traffic = [await asyncio.to_thread(router, verb, "--json") for verb in ("status", "traffic")]
    assert status.json["models"]["phi-4"]["warnings"] == [LOOSE]
    assert status.json["models"]["gpt-4o-mini"]["warnings"] == []
    assert traffic.json["phi-4"]["warnings"] == [LOOSE]
    for verb in ("status", "traffic"):
        result = (await asyncio.to_thread(router, verb)).out
        assert "10000/min never binds" in result


def test_sync_warns_of_a_default_target_that_never_binds(router: CommandLine, tmp_path: Path):
    config = yaml.safe_load((DEFAULT_CONFIG_FOLDER / "models.yaml").read_text())
    config["models"]["phi-4"]["target"] = "10000/min, 1/s"
    (tmp_path / "models.yaml").write_text(yaml.safe_dump(config))
    result = router("models", "sync", "--config", str(tmp_path))
    assert result.code == 0
    assert f"phi-4: {LOOSE}" in " ".join(result.err.split())
