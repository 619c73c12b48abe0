"""`router status`, `watch`, `traffic`, `models` and `migrate`, on real PostgreSQL, Redis and HTTP."""

from __future__ import annotations

import asyncio
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import psycopg2
import pytest
import redis
import redis.asyncio

from local.redis import RedisServer
from router.database import connect, open_pool, rows
from router.limiter.limiter import TrafficLimiter
from router.models.airflow_api import AirflowApi
from router.models.targets import TargetSync
from router.settings.environment import DEFAULT_CONFIG_FOLDER
from router.task import Outcome, new_call_id
from tests.support.command_line import CommandLine

Ask = Callable[..., list[dict[str, Any]]]
NOWHERE = "redis://127.0.0.1:9/0"


@pytest.fixture
def clean_redis(redis_server: RedisServer) -> str:
    with closing(redis.Redis.from_url(redis_server.url)) as client:
        client.flushall()
    return redis_server.url


@pytest.fixture
def router(database: str, clean_redis: str) -> CommandLine:
    return CommandLine({"ROUTER_DATABASE_URL": database, "ROUTER_REDIS_URL": clean_redis})


@pytest.fixture
def ask(database: str) -> Ask:
    def run(statement: str, *arguments: Any) -> list[dict[str, Any]]:
        with connect(database) as connection:
            return rows(connection, statement, arguments)

    return run


def send(redis_url: str, target: str, times: int) -> None:
    """Sets a target for phi-4 and reserves permits."""

    async def sending() -> None:
        client = redis.asyncio.Redis.from_url(redis_url)
        async with TrafficLimiter(client) as limiter:
            await limiter.set_target("phi-4", target)
            for _ in range(times):
                assert await limiter.reserve("phi-4", tokens=50)
        await client.aclose()

    asyncio.run(sending())


# -- status -----------------------------------------------------------------------------------------------


def test_tasks_are_shown_by_state(router: CommandLine, ask: Ask):
    ask("INSERT INTO tasks (prompt, category) SELECT 'p', 'technical' FROM generate_series(1, 5)")
    ask("INSERT INTO tasks (prompt, status, answer) VALUES ('s', 'solved', 'S'), ('f', 'failed', NULL)")
    ask("UPDATE queue SET state = 'waiting', wake_at = now() WHERE task_id = 2")
    ask("SELECT heartbeat('w')")
    ask("SELECT * FROM claim_task('phi-4', '{technical}', 'w', %s, 100)", str(new_call_id(time.time())))
    status = router("status", "--json").json
    assert status["tasks"] == {
        "unsolved": 5,
        "uncategorised": 0,
        "ready": 3,
        "waiting": 1,
        "running": 1,
        "solved": 1,
        "failed": 1,
    }
    assert status["categories"]["technical"] == {"unsolved": 5, "solved": 0, "failed": 0}
    assert status["models"]["phi-4"]["in_flight"] == 1
    assert (status["workers"], status["held"]) == (1, False)
    result = router("status").out
    assert "5 unsolved   1 running   1 waiting   1 solved   1 failed" in result
    assert "technical 5" in result


def test_usage_is_shown_for_each_limit(router: CommandLine, clean_redis: str):
    send(clean_redis, "10/min, 4k tokens/min, 3 at once, burst", 2)
    model = router("status", "--json").json["models"]["phi-4"]
    assert model["target"] == "10/min, 4k tokens/min, 3 at once, burst"
    assert (model["sent"], model["tokens"]) == ({"10/min": 2}, {"4k tokens/min": 100})
    assert (model["in_flight"], model["at_once"], model["target_kept"]) == (2, 3, False)
    result = router("status").out
    assert "2 of 10/min, 100 of 4k tokens/min" in result
    assert "2 of 3" in result


def test_a_target_above_the_providers_quota_is_reported(router: CommandLine, clean_redis: str):
    async def refused() -> None:
        client = redis.asyncio.Redis.from_url(clean_redis)
        async with TrafficLimiter(client) as limiter:
            for outcome in [Outcome.RATE_LIMITED] * 2 + [Outcome.ERROR] * 5:
                await limiter.record_outcome("phi-4", outcome, why="so")
        await client.aclose()

    send(clean_redis, "10/min, burst", 1)
    asyncio.run(refused())
    model = router("status", "--json").json["models"]["phi-4"]
    assert (model["refused"], model["breaker"]) == (2, "open")
    assert 0 <= model["refused_seconds"] < 30
    assert any("above what the provider allows" in warning for warning in model["warnings"])
    result = " ".join(router("status").out.split())
    assert "2 of its calls refused (429)" in result


def test_without_redis_usage_comes_from_the_call_log(router: CommandLine, ask: Ask):
    ask("INSERT INTO tasks (prompt) VALUES ('p')")
    ask("SELECT heartbeat('w')")
    ask("SELECT record_target('phi-4', '7/min', 1)")
    ask("SELECT * FROM claim_task('phi-4', '{general}', 'w', %s, 100)", str(new_call_id(time.time())))
    result = router("status", "--redis", NOWHERE, "--json")
    model = result.json["models"]["phi-4"]
    assert (result.code, "Redis is unavailable" in result.json["notes"][0]) == (0, True)
    assert (model["target"], model["target_kept"], model["sent_last_minute"]) == ("7/min", True, 1)
    assert "7/min; 1 in the last minute" in router("status", "--redis", NOWHERE).out
    assert "ROUTER_REDIS_URL is not set" in router("status", "--redis", "").out


def test_reasons_for_not_sending_are_reported(router: CommandLine, ask: Ask, clean_redis: str):
    def codes() -> tuple[str, str]:
        now = router("status", "--json").json
        return now["why_not"]["code"], now["models"]["phi-4"]["why_not"]["code"]

    send(clean_redis, "5/min", 0)
    assert "Not sending No worker is running" in " ".join(router("status").out.split())
    assert codes() == ("no_worker", "no_worker")
    ask("SELECT heartbeat('w')")
    assert codes() == ("no_tasks", "no_tasks")
    ask("INSERT INTO tasks (prompt) VALUES ('p')")
    assert codes()[1] == "rebuilding"
    assert "state is being rebuilt" in " ".join(router("status").out.split())
    ask("SELECT set_paused(true, 1)")
    assert "solve_tasks is paused" in router("status").out
    assert codes() == ("paused", "paused")


def test_errors_of_models_are_shown(router: CommandLine, ask: Ask):
    ask("SELECT record_target_error('phi-4', '12/mn', E'''mn'' is not a unit of time.\\nGrammar')")
    ask("UPDATE roster SET trouble = 'the backend does not know it' WHERE model = 'deepseek-v3'")
    ask("INSERT INTO tasks (prompt) VALUES ('p')")
    call_id = str(new_call_id(time.time()))
    ask("SELECT heartbeat('w')")
    ask("SELECT * FROM claim_task('gpt-4o-mini', '{general}', 'w', %s, 100)", call_id)
    ask("SELECT settle_call(%s, 'timeout', NULL, p_error => 'no answer in 180 s')", call_id)
    models = router("status", "--json").json["models"]
    assert models["phi-4"]["trouble"] == "invalid traffic Variable: 'mn' is not a unit of time."
    assert models["deepseek-v3"]["trouble"] == "the backend does not know it"
    assert models["gpt-4o-mini"]["last_error"] == "timeout: no answer in 180 s"
    assert (models["gpt-4o-mini"]["calls"], models["gpt-4o-mini"]["failed_calls"]) == (1, 1)
    assert "1 of 1 recent calls failed, last: timeout: no answer in 180 s" in router("status").out


# -- watch ------------------------------------------------------------------------------------------------


def test_watch_stops_after_the_given_seconds(router: CommandLine):
    started = time.monotonic()
    result = router("watch", "--seconds", "1.5", "--json")
    assert 1.5 <= time.monotonic() - started < 15
    lines = [json.loads(line) for line in result.out.splitlines()]
    assert 2 <= len(lines) <= 3  # a reading takes its time, too
    assert all(line["tasks"]["unsolved"] == 0 for line in lines)


def test_watch_ends_cleanly_when_interrupted(router: CommandLine):
    with router.start("watch", "--json") as program:
        assert program.stdout is not None
        assert program.stderr is not None
        program.stdout.readline()  # it has begun
        program.send_signal(signal.SIGINT)
        assert program.stderr.read() == b""
        assert program.wait(30) == 0


@pytest.mark.soak
def test_watch_continues_while_postgres_is_unavailable(router: CommandLine, database: str):
    name = psycopg2.extensions.parse_dsn(database)["dbname"]
    admin = psycopg2.extensions.make_dsn(database, dbname="postgres")
    with router.start("watch", "--json") as program, closing(psycopg2.connect(admin)) as connection:
        assert program.stdout is not None
        connection.autocommit = True
        program.stdout.readline()
        rows(connection, f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS false')
        assert any(b"error" in line for line in program.stdout)
        rows(connection, f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS true')
        assert any(b"tasks" in line for line in program.stdout)
        program.send_signal(signal.SIGINT)


# -- traffic ----------------------------------------------------------------------------------------------


class FakeAirflow(ThreadingHTTPServer):
    """Simulated REST API for Variables; a token is valid for `token_uses` calls."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.variables: dict[str, str] = {}
        self.tokens: dict[str, int] = {}
        self.token_uses = 2

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: FakeAirflow

    def log_message(self, *_: Any) -> None:
        pass

    def _reply(self, status: int, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _body(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        return found

    def _refused(self) -> bool:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        left = self.server.tokens.get(token, 0)
        self.server.tokens[token] = left - 1
        if left <= 0:
            self._reply(401, {"detail": "Token Expired"})
        return left <= 0

    def do_POST(self) -> None:
        body = self._body()
        if self.path == "/auth/token":
            if (body["username"], body["password"]) != ("router", "secret"):
                return self._reply(401, {"detail": "Invalid credentials"})
            token = f"t{len(self.server.tokens)}"
            self.server.tokens[token] = self.server.token_uses
            return self._reply(201, {"access_token": token})
        if not self._refused():
            self.server.variables[body["key"]] = body["value"]
            self._reply(201, body)
        return None

    def do_PATCH(self) -> None:
        body = self._body()
        if self._refused():
            return
        if body["key"] not in self.server.variables:
            self._reply(404, {"detail": "not found"})
        else:
            self.server.variables[body["key"]] = body["value"]
            self._reply(200, body)

    def do_GET(self) -> None:
        if self._refused():
            return
        offset = int(parse_qs(urlsplit(self.path).query)["offset"][0])
        entries = [{"key": key, "value": value} for key, value in sorted(self.server.variables.items())]
        self._reply(200, {"variables": entries[offset : offset + 2], "total_entries": len(entries)})


@pytest.fixture
def airflow() -> Iterator[FakeAirflow]:
    with FakeAirflow() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def traffic(router: CommandLine, airflow: FakeAirflow) -> CommandLine:
    names = {"URL": airflow.url, "USER": "router", "PASSWORD": "secret"}
    return CommandLine(
        {**router.environment, **{f"ROUTER_AIRFLOW_{key}": value for key, value in names.items()}}
    )


@contextmanager
def watching(airflow: FakeAirflow, database: str, redis_url: str) -> Iterator[None]:
    """Applies the Variables to the limiter, as a worker does."""
    ending = threading.Event()

    async def watch() -> None:
        pool = await open_pool(database, connections=1)
        client = redis.asyncio.Redis.from_url(redis_url)
        async with TrafficLimiter(client) as limiter:
            watched = TargetSync(pool, limiter)
            while not ending.is_set():
                lines = {key.removeprefix("traffic."): value for key, value in airflow.variables.items()}
                await watched.apply(lines, version=time.time_ns() // 1000)
                await asyncio.sleep(0.05)
        await client.aclose()
        await pool.close()

    thread = threading.Thread(target=asyncio.run, args=(watch(),))
    thread.start()
    try:
        yield
    finally:
        ending.set()
        thread.join()


def test_setting_a_target_waits_until_it_is_active(
    traffic: CommandLine, airflow: FakeAirflow, database: str, clean_redis: str
):
    with watching(airflow, database, clean_redis):
        result = traffic("traffic", "phi-4", "120/min,", "4/s")  # as typed without quotes
        assert (result.code, result.out.startswith("phi-4: 120/min, 4/s, active after ")) == (0, True)
        assert airflow.variables == {"traffic.phi-4": "120/min, 4/s"}
        result = traffic("traffic", "phi-4", "0", "--json").json
        assert (result["target"], result["in_force"], result["seconds"] < 3) == ("0", True, True)
    shown = traffic("traffic", "--json").json["phi-4"]
    assert (shown["target"], shown["in_force"], shown["variable"]) == ("0", True, "0")
    assert shown["since"] is not None


def test_an_invalid_target_is_rejected_with_its_column(traffic: CommandLine, airflow: FakeAirflow):
    result = traffic("traffic", "phi-4", "120/mn")
    assert (result.code, result.err) == (
        1,
        (
            "router: 'mn' is not a unit of time at column 5 of '120/mn'. Did you mean 'min'?"
            " See `router traffic --help`.\n"
        ),
    )
    assert airflow.variables == {}


def test_a_target_that_does_not_become_active_is_an_error(traffic: CommandLine, ask: Ask):
    ask("SELECT heartbeat('w')")
    result = traffic("traffic", "phi-4", "5/min")
    assert (result.code, "is not active after 3 s" in result.err) == (1, True)


def test_without_a_worker_the_target_is_set_for_later(traffic: CommandLine, airflow: FakeAirflow):
    result = traffic("traffic", "phi-4", "5/min")
    assert (result.code, "applies when a worker reads it" in result.out) == (0, True)
    assert airflow.variables == {"traffic.phi-4": "5/min"}


def test_variables_that_differ_from_the_target_are_shown(
    traffic: CommandLine, airflow: FakeAirflow, clean_redis: str
):
    send(clean_redis, "60/min", 0)
    airflow.variables = {"traffic.phi-4": "60/1min", "traffic.deepseek-v3": "nonsense", "other": "x"}
    result = traffic("traffic").out
    lines = {line.split()[0]: line for line in result.splitlines() if line}
    assert "same" in lines["phi-4"]
    assert "nonsense" in lines["deepseek-v3"]
    assert "the last target stays active" in lines["gpt-4o-mini"]
    assert "gpt-4o-mini" not in traffic("traffic", "phi-4").out


def test_unknown_models_and_an_unreachable_airflow_are_reported(router: CommandLine, traffic: CommandLine):
    assert "did you mean 'phi-4'?" in traffic("traffic", "phi4", "5/min").err
    assert "ROUTER_AIRFLOW_URL is not set" in router("traffic", "phi-4", "5/min").err
    away = ("--airflow", "http://127.0.0.1:9")
    assert "cannot be reached: no connection" in traffic("traffic", "phi-4", "5/min", *away).err
    shown = traffic("traffic", *away)
    assert (shown.code, "The Variables could not be read" in shown.err) == (0, True)
    wrong = traffic("traffic", "phi-4", "5/min", "--airflow-password", "wrong")
    assert (wrong.code, "Invalid credentials" in wrong.err) == (1, True)


def test_the_client_logs_in_again_and_reads_all_pages(airflow: FakeAirflow):
    with AirflowApi(airflow.url, "router", "secret") as api:
        for number in range(5):
            assert api.create_variable(f"traffic.m{number}", "1/min")
        assert len(api.variables("traffic.")) == 5
    assert len(airflow.tokens) > 2


# -- models, migrate, help --------------------------------------------------------------------------------


def test_models_lists_and_syncs_the_roster(router: CommandLine, ask: Ask, tmp_path: Path):
    models = router("models", "--json").json
    assert models["phi-4"]["places"].keys() == {"technical", "creative", "general"}
    assert "phi-4" in router("models").out
    text = (DEFAULT_CONFIG_FOLDER / "models.yaml").read_text()
    (tmp_path / "models.yaml").write_text(text.replace("phi-4", "phi-5"))
    result = router("models", "sync", "--config", tmp_path, "--json").json
    assert (result["added"], result["changed"]) == (["phi-5"], ["phi-4"])
    assert router("models", "--json").json["phi-4"]["state"] == "paused"
    again = router("models", "sync", "--config", tmp_path, "--json").json
    assert (again["added"], again["changed"]) == ([], [])


def test_migrate_reports_what_it_did(empty_database: str):
    router = CommandLine({"ROUTER_DATABASE_URL": empty_database})
    assert "001_tasks.sql" in router("migrate").out
    assert router("migrate", "--json").json["applied"] == []


@pytest.mark.parametrize("verb", ["load", "status", "watch", "traffic", "export", "retry", "models"])
def test_help_contains_examples_and_environment_variables(verb: str):
    result = " ".join(CommandLine({})(verb, "--help").out.split())
    assert f"router {verb}" in result.split("Examples:")[1]
    assert "[env var: ROUTER_DATABASE_URL]" in result


def test_a_missing_database_is_one_message(router: CommandLine, database: str):
    result = router("status", "--database", database.replace("/test_", "/none_"))
    assert (result.code, result.out, result.err.count("\n")) == (1, "", 1)
