"""`router models search` on the shipped config and the stand-in as it starts: verdicts, undo, crashes."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from local.redis import RedisServer
from models_backend.process import BackendServer, start_backend
from models_backend.settings import NEW_MODELS
from router.database import connect, rows
from router.discovery.search import SearchBusy
from router.settings.environment import DEFAULT_CONFIG_FOLDER, Addresses
from router.settings.models import DISCOVERED
from tests.support.command_line import CommandLine
from tests.support.discovery import CATEGORIES, Searching, fake_airflow

BETTER, BETTER_SCORES, FAILING = NEW_MODELS
FAST = "60000/min, burst"
MAX_FAILED_CALLS = 5 + 4  # and those in flight, as configured


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BackendServer]:
    """The stand-in as it starts, only faster."""
    server = start_backend(tmp_path_factory.mktemp("backend"), "--time-scale", "200")
    yield server
    server.stop()


@pytest.fixture
def world(
    database: str, redis_server: RedisServer, redis_client: object, backend: BackendServer, tmp_path: Path
) -> Iterator[Searching]:
    """The shipped config with targets that a test can wait for."""
    folder = tmp_path / "config"
    shutil.copytree(DEFAULT_CONFIG_FOLDER, folder, ignore=shutil.ignore_patterns(DISCOVERED))
    edit(folder / "models.yaml", lambda found: [one.update(target=FAST) for one in found["models"].values()])
    edit(folder / "search.yaml", lambda found: found["trials"].update(target=FAST))
    with fake_airflow() as airflow:
        addresses = Addresses(database_url=database, redis_url=redis_server.url, backend_url=backend.url)
        world = Searching(addresses, folder, backend, airflow)
        world.sync()
        yield world


@pytest.fixture
def router(world: Searching) -> CommandLine:
    assert world.airflow is not None
    return CommandLine({
        "ROUTER_DATABASE_URL": world.addresses.database_url, "ROUTER_REDIS_URL": world.addresses.redis_url,
        "MODELS_BACKEND_URL": world.addresses.backend_url, "ROUTER_CONFIG": str(world.folder),
        "ROUTER_AIRFLOW_URL": f"http://127.0.0.1:{world.airflow.server_address[1]}",
        "ROUTER_AIRFLOW_USER": "router", "ROUTER_AIRFLOW_PASSWORD": "secret", "COLUMNS": "80",
    })  # fmt: skip


def edit(path: Path, change: Any) -> None:
    found = yaml.safe_load(path.read_text())
    change(found)
    path.write_text(yaml.safe_dump(found))


def test_a_search_on_the_shipped_config_admits_the_better_model_and_undo_restores_everything(
    router: CommandLine, world: Searching
) -> None:
    before = world.everything()
    done = router("models", "search", "--by", "ann")
    assert done.code == 0, done.err
    assert max(map(len, done.out.splitlines())) <= 80 + len(str(world.folder))  # a path is not wrapped
    assert max(map(len, done.err.splitlines())) <= 80
    found = world.query("SELECT model, category, verdict, reason FROM candidates WHERE trial IS NOT NULL")
    by_verdict = {verdict: {(r["model"], r["category"]) for r in found if r["verdict"] == verdict}
                  for verdict in ("taken", "lost")}  # fmt: skip
    assert by_verdict["taken"] == {(BETTER, "general")}
    assert by_verdict["lost"] == {
        *((model, category) for model in (BETTER_SCORES, FAILING) for category in CATEGORIES),
        (BETTER, "technical"), (BETTER, "creative"),
    }  # fmt: skip
    failed = {row["reason"] for row in found if row["model"] == FAILING}
    assert all(reason.startswith("none of its first calls was answered: 500") for reason in failed), failed
    assert world.calls_of(FAILING) <= MAX_FAILED_CALLS  # in all categories together

    # Progress, verdicts, and what the search changed.
    for words in (
        "60 models in the catalogs, 15 invalid entries", "search 1 by ann", "judging pairs of answers",
        f"general: {BETTER}: admitted: better than llama-3.3-70b",
    ):  # fmt: skip
        assert words in " ".join(done.err.split()), done.err
    assert "13 of them not served; tried:" in " ".join(done.out.split())
    assert "Not tried: 31 not served, 143 refused, 12 known" in done.out
    assert done.out.count("does not list") == 0  # unserved models are counted
    assert f"Appended to {world.folder / DISCOVERED}:\n{BETTER}:\n" in done.out
    assert world.discovered()[BETTER]["target"] == "6/min"
    assert world.airflow is not None
    assert world.airflow.variables == {f"traffic.{BETTER}": "6/min"}

    # In use, with its evidence; the unserved candidates take one line.
    shown = router("models").out
    assert f"{BETTER} on probation: initial target 6/min" in shown
    assert "30 general; needed in one category: 40" in " ".join(shown.split())
    assert shown.count("not served by the Models Backend") == 1
    assert len(shown.splitlines()) < 60
    reviewed = router("models", "review")
    assert reviewed.out == f"{BETTER}: stays on probation: general: 30 of 40 calls\n"

    undone = router("models", "undo")
    assert undone.out.startswith(f"{BETTER}: admission undone")
    assert world.everything() == before
    assert not (world.folder / DISCOVERED).exists()


def test_a_dry_run_names_the_served_candidates(router: CommandLine, world: Searching) -> None:
    done = router("models", "search", "--dry-run", "--category", "general", "--json")
    (plan,) = done.json["plans"]
    assert set(plan["candidates"]) == set(NEW_MODELS)
    assert len(plan["judges"]) == 3
    assert world.value("SELECT count(*) FROM model_calls") == 0


def test_a_second_search_says_which_one_runs_and_a_killed_one_leaves_nothing_half_done(
    router: CommandLine, world: Searching
) -> None:
    edit(world.folder / "search.yaml", lambda found: found["trials"].update(target="60/min"))
    before = world.everything()
    process = router.start("models", "search", "--category", "general", "--by", "bob")
    try:
        deadline = time.monotonic() + 60
        running: dict[str, Any] = {}
        while not (running.get("progress") or {}).get("calls"):
            assert time.monotonic() < deadline
            assert process.poll() is None, process.communicate()
            running = next(iter(world.query("SELECT * FROM running_search()")), {})
            time.sleep(0.05)
        assert running["by"] == "bob"
        with pytest.raises(SearchBusy, match=r"Search 1, started \d+ s ago by bob, is still running \(call"):
            world.search()
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert world.everything() == before
    with connect(world.addresses.database_url, autocommit=True) as connection:
        deadline = time.monotonic() + 10
        while rows(connection, "SELECT FROM running_search()"):  # until Postgres has noticed
            assert time.monotonic() < deadline
            time.sleep(0.05)
    edit(world.folder / "search.yaml", lambda found: found["trials"].update(target=FAST))
    edit(world.folder / "search.yaml", lambda found: found["criteria"].update(candidates=0))
    world.search()
    first, second = world.query("SELECT ended_at, notes, progress FROM searches ORDER BY search")
    assert (first["notes"], first["progress"]) == (["interrupted: its process ended"], None)
    assert (second["notes"], second["progress"]) == ([], None)
    assert first["ended_at"] is not None


def test_a_search_that_fails_is_recorded_with_its_reason(world: Searching) -> None:
    broken = Addresses(
        database_url=world.addresses.database_url, redis_url=world.addresses.redis_url,
        backend_url="http://127.0.0.1:1",
    )  # fmt: skip
    with pytest.raises(Exception, match="does not answer"):
        Searching(broken, world.folder, world.backend, world.airflow).search()
    (row,) = world.query("SELECT ended_at IS NOT NULL AS ended, notes FROM searches")
    assert row["ended"]
    assert row["notes"][0].startswith("ended early: The Models Backend does not answer")
    assert world.query("SELECT * FROM running_search()") == []
