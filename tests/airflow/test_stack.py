"""The embedded stack from the command line: demo, health, logins, isolation and shutdown."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path

import psutil
import psycopg2
import pytest
import redis

from bench.demo import command_started
from local.airflow_api import AirflowApi, AirflowApiError
from local.restarts import MAX_DEATHS
from router.settings.router import load_config
from router.traffic import GRAMMAR

pytestmark = [pytest.mark.airflow, pytest.mark.timeout(400)]
ROOT = Path(__file__).parents[2]
UP = "The stack is ready"
SOLVED = "The stack keeps running"
TASKS = 40
SET_UP_SECONDS = 30  # time of make before Python, as passed to the demo
PROCESSES = {"postgres", "redis", "backend", "api-server", "scheduler", "dag-processor", "triggerer"}


class Launcher:
    """`python -m local up` or `python -m bench.demo` on one folder, in its own session."""

    def __init__(self, data: Path, *command: str) -> None:
        self.data = data
        self.output = data.with_suffix(".out")
        self.report = data.with_suffix(".json")
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *command, "--data", str(data), "--time-scale", "60"],
                cwd=ROOT, env={**os.environ, "ROUTER_DEMO_STARTED_AT": str(time.time() - SET_UP_SECONDS)},
                stdout=output, stderr=output, start_new_session=True,
            )  # fmt: skip

    @classmethod
    def demo(cls, data: Path, *more: str) -> Launcher:
        report = str(data.with_suffix(".json"))
        return cls(data, "bench.demo", "--tasks", str(TASKS), "--json", report, "--timeout", "240", *more)

    @property
    def text(self) -> str:
        return self.output.read_text()

    def wait_until(self, words: str) -> None:
        """Waits until the output contains `words`."""
        wait_until(lambda: words in self.text or self.process.poll() is not None, 240)
        assert words in self.text, self.text

    def family(self) -> list[psutil.Process]:
        """Returns all running descendants, without zombies."""
        return running_of(psutil.Process(self.process.pid).children(recursive=True))

    def addresses(self) -> dict[str, str]:
        """Returns the variables of router.env as a shell reads them."""
        script = 'set -a; . "$0"; set +a; exec "$1" -c "import json, os; print(json.dumps(dict(os.environ)))"'
        command = ["sh", "-c", script, str(self.data / "router.env"), sys.executable]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env={})
        environment: dict[str, str] = json.loads(done.stdout)
        return environment

    def api(self, user: str) -> AirflowApi:
        passwords = json.loads((self.data / "secrets.json").read_text())
        return AirflowApi(self.addresses()["ROUTER_AIRFLOW_URL"], user, passwords[user])

    def end(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(60)


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not become true in time"
        time.sleep(0.05)


def running_of(family: list[psutil.Process]) -> list[psutil.Process]:
    return [
        process for process in family if process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    ]


@pytest.fixture(scope="module")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    running = Launcher.demo(tmp_path_factory.mktemp("stack") / "first")
    try:
        running.wait_until(SOLVED)
        yield running
    finally:
        if running.process.poll() is None:
            family = running.family()
            assert running.end() == 0
            assert running_of(family) == []


def test_the_demo_solves_its_tasks_and_reports(launcher: Launcher) -> None:
    check_report(launcher)


@pytest.mark.soak
def test_the_demo_with_exit_ends_all_processes(tmp_path: Path) -> None:
    running = Launcher.demo(tmp_path / "demo", "--exit")
    running.wait_until(UP)
    family = running.family()
    assert running.process.wait(300) == 0, running.text
    check_report(running)
    assert running_of(family) == []


def check_report(launcher: Launcher) -> None:
    report = json.loads(launcher.report.read_text())
    assert set(report) == {
        *("tasks", "solved", "failed", "seconds", "seconds_to_first_answer", "bound_seconds", "models")
    }
    assert report["tasks"] == TASKS
    assert report["solved"] + report["failed"] == TASKS
    assert report["solved"] >= TASKS - 4  # the simulated backend sometimes gives bad answers
    assert 0 < report["bound_seconds"] <= report["seconds"]
    assert report["seconds_to_first_answer"] > SET_UP_SECONDS
    assert set(report["models"]) == set(load_config().models)
    for model in report["models"].values():
        assert set(model) == {"target", "sent", "worst_window_ratio", "use"}
        assert model["worst_window_ratio"] <= 1
    assert sum(model["sent"] for model in report["models"].values()) >= report["solved"]


def test_the_demo_measures_from_the_start_of_the_command() -> None:
    assert command_started({"ROUTER_DEMO_STARTED_AT": "1700000000"}) == 1_700_000_000
    assert command_started({}) == psutil.Process().create_time()


def test_all_processes_are_healthy(launcher: Launcher) -> None:
    with launcher.api("viewer") as api:
        assert api.health() == dict.fromkeys(
            ("metadatabase", "scheduler", "triggerer", "dag_processor"), True
        )
    assert {path.stem for path in (launcher.data / "logs").glob("*.log")} >= PROCESSES


def test_the_output_contains_addresses_and_logins(launcher: Launcher) -> None:
    secrets = json.loads((launcher.data / "secrets.json").read_text())
    assert launcher.addresses()["ROUTER_AIRFLOW_URL"] in launcher.text
    assert secrets["admin"] in launcher.text
    assert secrets["viewer"] in launcher.text
    assert secrets["router"] not in launcher.text
    assert secrets["postgres"] not in launcher.text


def test_a_wrong_password_is_rejected(launcher: Launcher) -> None:
    url = launcher.addresses()["ROUTER_AIRFLOW_URL"]
    with AirflowApi(url, "admin", "guessed") as api, pytest.raises(AirflowApiError) as refused:
        api.variables()
    assert refused.value.status == 401


def test_permissions_of_each_user(launcher: Launcher) -> None:
    with launcher.api("viewer") as viewer, pytest.raises(AirflowApiError) as refused:
        viewer.set_variable("test.role", "1")
    assert refused.value.status == 403
    with launcher.api("router") as service:
        service.set_variable("test.role", "1", "made by a test")
        service.set_variable("test.role", "2")
        assert service.variables("test.") == {"test.role": "2"}
        assert service.call("GET", "/variables/test.role")["description"] == "made by a test"
        service.delete_variable("test.role")


def test_each_model_has_a_traffic_variable_with_the_grammar(launcher: Launcher) -> None:
    models = load_config().models
    with launcher.api("router") as api:
        expected = {f"traffic.{name}": model.target for name, model in models.items()}
        assert api.variables("traffic.") == expected
        assert GRAMMAR in api.call("GET", f"/variables/traffic.{next(iter(models))}")["description"]


def test_the_dags_parse(launcher: Launcher) -> None:
    with launcher.api("viewer") as api:
        wait_until(lambda: "solve_tasks" in api.dag_ids(), 60)
        assert api.import_errors() == []


def test_router_env_works_with_both_drivers(launcher: Launcher) -> None:
    addresses = launcher.addresses()
    connection = psycopg2.connect(addresses["ROUTER_DATABASE_URL"])
    with connection.cursor() as cursor:
        cursor.execute("SELECT count(*) FROM tasks")
        assert cursor.fetchone() == (TASKS,)
    connection.close()
    with redis.Redis.from_url(addresses["ROUTER_REDIS_URL"]) as client:
        assert client.ping()


def test_airflows_connections_give_valid_urls(launcher: Launcher) -> None:
    """Reads them as a trigger does, by id."""
    code = """
import asyncio, asyncpg, psycopg2, redis, requests
from airflow.sdk import Connection
url = Connection.get("router_db").get_uri()
psycopg2.connect(url).close()
async def ask():
    connection = await asyncpg.connect(url)
    await connection.fetch("SELECT 1 FROM tasks")
    await connection.close()
asyncio.run(ask())
redis.Redis.from_url(Connection.get("router_redis").get_uri()).ping()
assert requests.get(Connection.get("models_backend").get_uri() + "/health").ok
"""
    (triggerer,) = [p for p in launcher.family() if p.cmdline()[1:4] == ["-m", "airflow", "triggerer"]][:1]
    done = subprocess.run(
        [sys.executable, "-c", code], env=triggerer.environ(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_secrets_are_readable_by_their_owner_only(launcher: Launcher) -> None:
    files = ["secrets.json", "router.env", "airflow/passwords.json", "redis/redis.conf"]
    assert {name: oct((launcher.data / name).stat().st_mode & 0o777) for name in files} == dict.fromkeys(
        files, "0o600"
    )
    assert (launcher.data / "postgres").stat().st_mode & 0o077 == 0
    logs = list((launcher.data / "logs").glob("*.log"))
    assert logs
    assert not [log.name for log in logs if log.stat().st_mode & 0o077]
    arguments = " ".join(" ".join(process.cmdline()) for process in launcher.family())
    secrets = json.loads((launcher.data / "secrets.json").read_text())
    assert [name for name, secret in secrets.items() if secret in arguments] == []


def test_everything_listens_on_the_loopback_only(launcher: Launcher) -> None:
    ports = json.loads((launcher.data / "ports.json").read_text()).values()
    listening = [
        ("a part of the stack", connection.laddr.ip)
        for connection in psutil.net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port in ports
    ]
    for process in launcher.family():
        # An Airflow task may have ended, and some processes of Airflow show their files to root only.
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            listening += [
                (process.name(), connection.laddr.ip)
                for connection in process.net_connections(kind="inet")
                if connection.status == psutil.CONN_LISTEN
            ]
    assert len(listening) >= 4
    assert {address for _, address in listening} == {"127.0.0.1"}, listening


def test_a_folder_is_used_by_one_stack_at_a_time(launcher: Launcher) -> None:
    second = Launcher.__new__(Launcher)
    second.data, second.output = launcher.data, launcher.data.with_suffix(".second")
    command = [sys.executable, "-m", "local", "up", "--data", str(launcher.data)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert f"in use by the stack with process id {launcher.process.pid}" in done.stdout
    assert launcher.process.poll() is None


def test_every_part_that_is_killed_starts_again_and_the_work_goes_on(launcher: Launcher) -> None:
    """The last test of the shared stack: `kill -9` of all its parts at once."""
    before = {name: process.pid for name in PROCESSES for process in parts(launcher, name)}
    assert set(before) == PROCESSES
    for name in PROCESSES:
        for process in parts(launcher, name):
            process.kill()
    for name in PROCESSES:
        wait_until(lambda: f"{name}: started again" in launcher.text, 60)  # noqa: B023
        assert f"{name}: ended by itself (SIGKILL), starts again" in launcher.text
        assert before[name] not in [process.pid for process in parts(launcher, name)]
    addresses = launcher.addresses()
    with redis.Redis.from_url(addresses["ROUTER_REDIS_URL"]) as client:
        wait_until(lambda: answers(client), 30)
    wait_until(lambda: solved_another_task(addresses["ROUTER_DATABASE_URL"]), 240)
    with launcher.api("viewer") as api:
        wait_until(lambda: all(api.health().values()) and bool(api.health()), 60)
    assert launcher.process.poll() is None


def answers(client: redis.Redis) -> bool:
    with suppress(redis.RedisError):
        return bool(client.ping())
    return False


def solved_another_task(url: str) -> bool:
    """Inserts one task unless it exists, and returns whether it is solved."""
    with suppress(psycopg2.OperationalError):
        connection = psycopg2.connect(url)
        with closing(connection), connection, connection.cursor() as cursor:
            cursor.execute(
                "INSERT INTO tasks (prompt, external_id) VALUES ('after the kill', 'after-the-kill')"
                " ON CONFLICT DO NOTHING"
            )
            cursor.execute("SELECT status = 'solved' FROM tasks WHERE external_id = 'after-the-kill'")
            return bool((cursor.fetchone() or (False,))[0])
    return False


@pytest.mark.soak
def test_two_stacks_run_in_parallel_and_end_completely(launcher: Launcher, tmp_path: Path) -> None:
    """The first is stopped, restarted and killed; a process of the second crashes. They are independent."""
    with launcher.api("router") as api:
        api.set_variable(f"traffic.{next(iter(load_config().models))}", "7/min")
    connection = psycopg2.connect(launcher.addresses()["ROUTER_DATABASE_URL"])
    with connection, connection.cursor() as cursor:
        cursor.execute("INSERT INTO tasks (prompt) VALUES ('kept over a restart')")
    connection.close()
    family = launcher.family()
    assert launcher.end(signal.SIGINT) == 0
    assert running_of(family) == []

    first, second = Launcher(launcher.data, "local", "up"), Launcher(tmp_path / "second", "local", "up")
    try:
        first.wait_until(UP)
        second.wait_until(UP)
        check_data_persisted(first)

        family = second.family()
        crash_dag_processor(second)
        assert running_of(family) == []

        with first.api("viewer") as api:
            assert all(api.health().values())
        family = first.family()
        first.end(signal.SIGKILL)
        wait_until(lambda: running_of(family) == [], 40)
    finally:
        for running in (first, second):
            if running.process.poll() is None:
                running.end()


def check_data_persisted(launcher: Launcher) -> None:
    with launcher.api("router") as api:
        assert "7/min" in api.variables("traffic.").values()
    connection = psycopg2.connect(launcher.addresses()["ROUTER_DATABASE_URL"])
    with connection.cursor() as cursor:
        cursor.execute("SELECT count(*) FROM tasks WHERE prompt = 'kept over a restart'")
        assert cursor.fetchone() == (1,)  # in addition to the demo's tasks
    connection.close()
    assert "migrate-airflow" not in launcher.text


def crash_dag_processor(launcher: Launcher) -> None:
    """Kills it as often as it is started again."""
    deadline = time.monotonic() + 90
    while launcher.process.poll() is None:
        for process in parts(launcher, "dag-processor"):
            process.kill()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert launcher.process.returncode == 1
    assert f"dag-processor ended {MAX_DEATHS} times within" in launcher.text
    assert "dag-processor ended by itself (SIGKILL)" in launcher.text


def parts(launcher: Launcher, name: str) -> list[psutil.Process]:
    """Returns the process of a part of the stack, a child of its guard."""
    found = []
    for guard in psutil.Process(launcher.process.pid).children():
        with suppress(psutil.NoSuchProcess, ValueError):
            words = guard.cmdline()
            if part_of(words[words.index("--") + 1 :]) == name:
                found += guard.children()
    return running_of(found)


def part_of(command: list[str]) -> str:
    """Returns the part that a command runs."""
    if command[1] != "-m":
        return Path(command[0]).name.removesuffix("-server")
    return command[3] if command[2] == "airflow" else command[2].removeprefix("models_")
