"""Every verb of the command line that changes something leaves an entry in the audit log."""

from __future__ import annotations

import getpass
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from local.redis import RedisServer
from models_backend.process import BackendServer, start_backend
from router.cli.main import app
from router.database import connect, rows
from router.discovery import store
from router.learning.pairwise import PricedModel
from router.learning.retention import drop_old_calls
from router.models.roster import RosterModel
from router.settings.environment import Addresses
from tests.support.command_line import CommandLine, CommandResult
from tests.support.discovery import FIRST, Searching, fake_airflow, models_yaml, write_config
from tests.support.reviews import Log, shipped_learning

NEW = "bright-9b"
READING = {
    "status", "watch", "clients", "log", "export", "audit", "doctor", "ranking explain",
    "categories evaluate", "categories explain", "knowledge list", "knowledge search",
    "knowledge evaluate", "keys list",
}  # fmt: skip
OTHERWISE = {
    "load": "tasks have their time and client",
    "serve": "calls of its clients are in the log, by client",
}
# Verbs that run for long: what they change is recorded by a trigger of this table.
BY_TRIGGER = {"models search": "searches", "models review": "roster_events"}


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BackendServer]:
    server = start_backend(tmp_path_factory.mktemp("backend"), "--time-scale", "200", "--also", FIRST)
    yield server
    server.stop()


class World(Searching):
    """Two models in use and one on probation; a failed and a solved task."""

    def run(self, *arguments: object) -> CommandResult:
        assert self.airflow is not None
        folder = self.folder
        return CommandLine({
            "ROUTER_DATABASE_URL": self.addresses.database_url, "ROUTER_REDIS_URL": self.addresses.redis_url,
            "MODELS_BACKEND_URL": self.addresses.backend_url, "ROUTER_CONFIG": str(folder),
            "ROUTER_API_KEYS": str(folder / "keys"), "ROUTER_DATA": str(folder / "data"),
            "ROUTER_AIRFLOW_URL": f"http://127.0.0.1:{self.airflow.server_address[1]}",
        })(*arguments)  # fmt: skip

    def entries(self) -> list[dict[str, Any]]:
        return list(self.run("audit", "--json").json)


@pytest.fixture
def world(
    database: str, redis_server: RedisServer, redis_client: object, backend: BackendServer, tmp_path: Path
) -> Iterator[World]:
    write_config(tmp_path)
    with fake_airflow() as airflow:
        addresses = Addresses(database_url=database, redis_url=redis_server.url, backend_url=backend.url)
        world = World(addresses, tmp_path, backend, airflow)
        with connect(database) as connection:
            rows(connection, "DELETE FROM roster")
        world.sync()
        admit(world)
        Log(database).add(FIRST, 5)
        world.query("INSERT INTO tasks (prompt, status, failure) VALUES ('p', 'failed', 'why')")
        world.query("DELETE FROM audit_log")
        yield world


def admit(world: World) -> None:
    """Admits a model as a search does."""
    model = RosterModel(
        model=NEW, endpoint=NEW, state="probation", max_tokens=500, timeout_seconds=60.0,
        default_target="6/min",
    )  # fmt: skip
    with connect(world.addresses.database_url) as connection:
        number = store.begin_search(connection, "a search")
        store.admit(
            connection, number, PricedModel(model, 0.1, 0.1), context_tokens=None, category="general",
            by="a search", why="it won", share=0.025, known={},
        )  # fmt: skip


def retry(world: World) -> tuple[str, str | None, str | None]:
    (task,) = world.query("SELECT id FROM tasks WHERE status = 'failed'")
    world.run("retry", task["id"], "--yes")
    return f"tasks {task['id']}", None, "1 requeued"


def feedback(world: World) -> tuple[str, str | None, str | None]:
    (task,) = world.query("SELECT min(id) AS id FROM tasks WHERE answer_call_id IS NOT NULL")
    world.run("feedback", task["id"], "good")
    world.run("feedback", task["id"], "0.25")
    return f"task {task['id']}", "1", "0.25"


def ask(world: World) -> tuple[str, str | None, str | None]:
    done = world.run("ask", "--category", "general", "--deadline", "30", "--json", "a secret prompt")
    return f"task {done.json['task_id']}", None, None


def traffic(world: World) -> tuple[str, str | None, str | None]:
    world.run("traffic", FIRST, "120/min")
    return FIRST, None, "120/min"


def sync(world: World) -> tuple[str, str | None, str | None]:
    settings = models_yaml()
    settings["models"][FIRST]["target"] = "7/min"
    (world.folder / "models.yaml").write_text(yaml.safe_dump(settings))
    world.run("models", "sync")
    text = "active; endpoint {}; target {}; context 8192; max tokens 512; timeout 180 s; prices 0.1, 0.1"
    return FIRST, text.format(FIRST, "60000/min, burst"), text.format(FIRST, "7/min")


def promote(world: World) -> tuple[str, str | None, str | None]:
    world.run("models", "promote", NEW)
    return NEW, "probation", "active"


def retire(world: World) -> tuple[str, str | None, str | None]:
    world.run("models", "retire", NEW)
    return NEW, "probation", "retired"


def undo(world: World) -> tuple[str, str | None, str | None]:
    world.run("models", "retire", NEW)
    world.run("models", "undo", NEW)
    return NEW, "retired", "probation"


def review(world: World) -> tuple[str, str | None, str | None]:
    number = world.run("review", "--json").json["review"]
    return f"review {number}", None, "0 ranks changed"


def undo_ranking(world: World) -> tuple[str, str | None, str | None]:
    for model, outcome in ((FIRST, "error"), ("quiet-7b", "answered")):
        Log(world.addresses.database_url).add(model, 800, outcome=outcome)
    done = world.run("review", "--json").json
    world.run("ranking", "undo")
    return f"review {done['review']}", None, f"{len(done['moves'])} ranks changed"


def add_knowledge(world: World) -> tuple[str, str | None, str | None]:
    (world.folder / "facts.md").write_text("# Facts\n\nThe moon is far.\n")
    world.run("knowledge", "add", world.folder / "facts.md")
    (row,) = world.query("SELECT source, checksum FROM knowledge_sources")
    return row["source"], None, f"checksum {row['checksum'][:12]}"


def remove_knowledge(world: World) -> tuple[str, str | None, str | None]:
    source, _, after = add_knowledge(world)
    world.run("knowledge", "remove", world.folder / "facts.md")
    return source, after, None


def add_key(world: World) -> tuple[str, str | None, str | None]:
    world.run("keys", "add", "alice", "--limit", "60/min", "--models", FIRST)
    (key,) = world.run("keys", "list", "--json").json
    return "alice", None, f"{key['id']}: limit 60/min, models {FIRST}, expires never"


def remove_key(world: World) -> tuple[str, str | None, str | None]:
    client, _, before = add_key(world)
    world.run("keys", "remove", "alice")
    return client, before, None


def migrate(world: World) -> tuple[str, str | None, str | None]:
    world.query("DELETE FROM router_migrations WHERE name = 'functions'")
    world.run("migrate")
    return "schema", None, "functions replaced"


Scenario = Callable[[World], tuple[str, str | None, str | None]]  # object, value before and after
CHANGING: dict[str, Scenario] = {
    "retry": retry, "feedback": feedback, "ask": ask, "traffic": traffic, "models sync": sync,
    "models promote": promote, "models retire": retire, "models undo": undo, "review": review,
    "ranking undo": undo_ranking, "knowledge add": add_knowledge, "knowledge remove": remove_knowledge,
    "keys add": add_key, "keys remove": remove_key, "migrate": migrate,
}  # fmt: skip


def verbs(group: Any, *above: str) -> Iterator[str]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from verbs(command, *above, name)
        else:
            yield " ".join((*above, name))


def test_every_verb_reads_or_is_audited() -> None:
    """A new verb fails here until it is named, and a changing one until it has a scenario below."""
    known = (*READING, *OTHERWISE, *BY_TRIGGER, *CHANGING)
    assert sorted(verbs(typer.main.get_command(app))) == sorted(known)


@pytest.mark.parametrize("verb", CHANGING)
def test_a_change_is_recorded_with_user_object_and_values(world: World, verb: str) -> None:
    name, before, after = CHANGING[verb](world)
    entries = [entry for entry in world.entries() if entry["action"] == verb]
    assert entries, f"`router {verb}` left no entry: call record_audit, or write a trigger"
    newest = {key: entries[0][key] for key in ("by", "via", "object", "before", "after")}
    assert newest == {
        "by": f"{getpass.getuser()}@{socket.gethostname()}", "via": "cli",
        "object": name, "before": before, "after": after,
    }  # fmt: skip


@pytest.mark.parametrize(
    "table", [*BY_TRIGGER.values(), "roster", "categories", "knowledge_sources", "reviews"]
)
def test_what_rows_change_is_recorded_by_a_trigger(database: str, table: str) -> None:
    statement = "SELECT count(*) AS n FROM pg_trigger WHERE tgrelid = %s::regclass AND tgname LIKE %s"
    with connect(database) as connection:
        found = rows(connection, statement, (table, "router_audit%"))
    assert found[0]["n"] >= 1


def test_a_session_that_names_nobody_is_recorded_by_its_role(world: World) -> None:
    import psycopg2  # noqa: PLC0415 - as a program of somebody else does

    with psycopg2.connect(world.addresses.database_url) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT session_user")
        role = cursor.fetchone()[0]
        cursor.execute("INSERT INTO categories (name) VALUES ('poetry')")
    (entry,) = world.entries()
    assert (entry["by"], entry["via"], entry["object"]) == (role, "sql", "category poetry")


def test_no_entry_holds_a_prompt_an_answer_or_a_key(world: World) -> None:
    for scenario in CHANGING.values():
        scenario(world)
    key = world.run("keys", "add", "bob").out.strip()
    everything = world.run("audit", "--json", "--limit", 10_000).out
    (task,) = world.query("SELECT prompt, answer FROM tasks WHERE prompt = 'a secret prompt'")
    for secret in (task["prompt"], task["answer"], key, "The moon is far"):
        assert secret not in everything


def test_entries_end_with_the_log_of_calls(world: World) -> None:
    world.query("INSERT INTO audit_log (at, by, via, action, object)"
                " SELECT now() - make_interval(days => d), 'ann', 'cli', 'retry', d::text"
                " FROM unnest(ARRAY[1, 29, 31, 400]) AS d")  # fmt: skip
    drop_old_calls(world.addresses.database_url, shipped_learning(retention_days=30))
    assert {entry["object"] for entry in world.entries()} == {"1", "29"}
    assert [e["object"] for e in world.run("audit", "--since", "2d", "--json").json] == ["1"]


def test_values_are_safe_for_a_terminal(world: World) -> None:
    world.query("SELECT record_audit('retry', %s, NULL, %s)", "\x1b]52;c;eA==\x07", "[red]x\u202e\x9b31m")
    shown = world.run("audit").out
    assert all(character.isprintable() or character == "\n" for character in shown)
    assert "[red]x" in shown


def test_without_a_database_a_key_is_made_and_a_note_says_so(tmp_path: Path) -> None:
    done = CommandLine({"ROUTER_API_KEYS": str(tmp_path / "keys")})("keys", "add", "alice")
    assert done.code == 0
    assert "no entry of `router keys add`: ROUTER_DATABASE_URL is not set" in " ".join(done.err.split())
