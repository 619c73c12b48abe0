"""Models on probation: promoted or retired by their evidence and by operators."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from models_backend.process import BackendServer
from router.database import connect, open_pool, rows
from router.discovery import store
from router.discovery.probation import Decision, promote, retire, review_probation, undo_search
from router.discovery.probation_rules import Step
from router.errors import InputError
from router.learning.pairwise import PricedModel
from router.models.roster import RosterModel, read_roster
from router.settings.discovery import load_discovery
from router.settings.environment import Addresses
from router.settings.learning import load_learning
from router.settings.models import DISCOVERED
from router.workers.assignment import PullOrder, Work, bounds
from tests.support.command_line import CommandLine
from tests.support.discovery import FIRST, SECOND, Searching, models_yaml, write_config
from tests.support.reviews import Log

NEW = "bright-9b"
NOWHERE, NO_REDIS = "http://127.0.0.1:1", "redis://127.0.0.1:1"


@pytest.fixture
def world(database: str, tmp_path: Path) -> Searching:
    """Two configured models, and one on probation for general."""
    addresses = Addresses(database_url=database, redis_url=NO_REDIS, backend_url=NOWHERE)
    write_config(tmp_path)
    backend: BackendServer = None  # type: ignore[assignment]  # no model is called
    world = Searching(addresses, tmp_path, backend)
    with connect(database) as connection:
        rows(connection, "DELETE FROM roster")
    world.sync()
    admit(world, "general")
    return world


def admit(world: Searching, *categories: str) -> None:
    """Admits the new model as a search does."""
    model = RosterModel(
        model=NEW,
        endpoint=NEW,
        state="probation",
        max_tokens=500,
        timeout_seconds=60.0,
        default_target="6/min",
    )
    with connect(world.addresses.database_url) as connection:
        number = store.begin_search(connection, "a test")
        for category in categories:
            event = store.admit(
                connection, number, PricedModel(model, 0.1, 0.1), context_tokens=None, category=category,
                by="a test", why="it won", share=0.025, known={},
            )  # fmt: skip
            assert event is not None


def log(world: Searching, **bad: float) -> Log:
    """200 calls of each model today, with a share of empty answers."""
    log = Log(world.addresses.database_url)
    for model, share in {FIRST: 0.3, SECOND: 0.3, NEW: 0.3, **bad}.items():
        log.add(model.replace("_", "-"), 200, bad_answers=share)
    return log


def decided(world: Searching, **options: bool) -> Decision:
    config = world.config
    (decision,) = review_probation(
        world.addresses.database_url, world.folder, config, load_learning(world.folder, config.categories),
        load_discovery(world.folder, config.categories), by="a review", **options,
    )  # fmt: skip
    return decision


def test_a_good_model_is_promoted(world: Searching) -> None:
    log(world, bright_9b=0.05).review()
    assert decided(world, dry_run=True).step is Step.PROMOTE
    assert world.roster()[NEW] == "probation"
    decision = decided(world)
    assert (decision.step, world.roster()[NEW]) == (Step.PROMOTE, "active")
    assert "general: lower bound" in decision.reason
    entry = world.discovered()[NEW]
    assert [change["what"] for change in entry["history"]] == ["taken", "promoted"]
    assert entry["history"][1]["why"] == decision.reason
    # The next review ranks it like any other model.
    Log(world.addresses.database_url).review()
    (row,) = world.query("SELECT place, most_share FROM rankings WHERE model = %s", NEW)
    assert row == {"place": 1, "most_share": 1.0}


@pytest.mark.parametrize("bad", [0.6, 1.0])
def test_a_worse_model_is_retired(world: Searching, bad: float) -> None:
    log(world, bright_9b=bad).review()
    assert (decided(world).step, world.roster()[NEW]) == (Step.RETIRE, "retired")
    assert world.query("SELECT FROM rankings WHERE model = %s", NEW) == []
    assert world.discovered()[NEW]["state"] == "retired"


def test_a_model_with_few_calls_is_retired_only_after_max_days(world: Searching) -> None:
    log = Log(world.addresses.database_url)
    for model, calls in ((FIRST, 200), (SECOND, 200), (NEW, 20)):
        log.add(model, calls)
    log.review()
    decision = decided(world)
    assert (decision.step, decision.reason) == (Step.STAY, "general: 20 of 40 calls")
    assert not (world.folder / DISCOVERED).exists()
    older = "UPDATE {} SET {} = {} - interval '15 days' RETURNING 1"
    world.query(older.format("roster_events", "at", "at"))
    world.query(older.format("roster", "changed_at", "changed_at"))
    decision = decided(world)
    assert decision.step is Step.RETIRE
    assert decision.reason.startswith("not promoted within 14 days; general: 20 of 40 calls")


def test_an_undone_decision_is_not_repeated_soon(world: Searching) -> None:
    log(world, bright_9b=0.05).review()
    decided(world)
    undo_search(world.addresses.database_url, world.folder, by="ann", model=NEW)
    assert world.roster()[NEW] == "probation"
    decision = decided(world)
    assert (decision.step, decision.reason) == (
        Step.STAY,
        "its last change was undone; no decision for 3 days",
    )


def test_a_promoted_model_leaves_categories_that_would_retire_it(world: Searching) -> None:
    undo_search(world.addresses.database_url, world.folder, by="ann")
    admit(world, "general", "technical")
    calls = log(world, bright_9b=0.05)
    for model, share in ((FIRST, 0.3), (SECOND, 0.3), (NEW, 0.9)):
        calls.add(model, 200, category="technical", bad_answers=share)
    calls.review()
    assert decided(world).step is Step.PROMOTE
    places = world.query("SELECT category FROM rankings WHERE model = %s", NEW)
    assert [row["category"] for row in places] == ["general"]
    assert world.discovered()[NEW]["ranks"] == {"general": 3}


async def test_on_probation_a_model_gets_tasks_only_of_the_category_that_admitted_it(
    world: Searching,
) -> None:
    pool = await open_pool(world.addresses.database_url, connections=1)
    roster = await read_roster(pool)
    await pool.close()
    rates = dict.fromkeys(roster.models, 1.0)
    bounded = bounds(Work({"general": 100, "creative": 100}, rates, roster.places, roster.learned))
    assert bounded == {NEW: {"general": 0.025, "technical": 0.0, "creative": 0.0}}
    order = PullOrder(places={"general": 3})
    order.set_bounds(bounded[NEW], {"general": 0, "creative": 0})
    order.set_bounds(bounded[NEW], {"general": 100, "creative": 100})
    assert order.categories(("creative", "general")) == ["general"]


def test_only_discovered_models_can_be_promoted_and_retired(world: Searching) -> None:
    url, folder = world.addresses.database_url, world.folder
    with pytest.raises(InputError, match="Unknown model 'nobody'"):
        promote(url, folder, "nobody", by="ann")
    with pytest.raises(InputError, match="was not found by a search"):
        retire(url, folder, FIRST, by="ann")
    retire(url, folder, NEW, by="ann")
    with pytest.raises(InputError, match="is retired, not probation"):
        promote(url, folder, NEW, by="ann")
    with pytest.raises(InputError, match="is retired, not probation or active"):
        retire(url, folder, NEW, by="ann")


@pytest.fixture
def router(world: Searching) -> CommandLine:
    return CommandLine(
        {
            "ROUTER_DATABASE_URL": world.addresses.database_url,
            "ROUTER_REDIS_URL": NO_REDIS,
            "MODELS_BACKEND_URL": NOWHERE,
            "ROUTER_CONFIG": str(world.folder),
        }
    )


def test_the_command_line_shows_promotes_undoes_and_retires(router: CommandLine, world: Searching) -> None:
    shown = router("models")
    assert shown.code == 0
    assert NEW in shown.out
    assert "probation" in shown.out
    assert "by a test: it won" in shown.out
    assert f"{NEW} on probation: initial target 6/min, calls as of the last review: 0 general" in shown.out
    assert router("models", "review").out.startswith(f"{NEW}: stays on probation: ")
    assert router("models", "--json").json[NEW]["source"] == "search"
    promoted = router("models", "promote", NEW, "--by", "ann")
    assert promoted.out.startswith(f"{NEW}: promoted")
    assert router("models", "undo", NEW).out.startswith(f"{NEW}: promotion undone")
    retired = router("models", "retire", NEW, "--json").json
    assert (retired["model"], retired["step"]) == (NEW, "retire")
    assert [one["what"] for one in router("models", "undo", "--json").json] == ["retired", "taken"]
    refused = router("models", "undo")
    assert (refused.code, "Nothing to undo" in refused.err) == (1, True)


def test_a_dry_run_on_the_command_line_names_the_candidates(router: CommandLine, world: Searching) -> None:
    done = router("models", "search", "--dry-run", "--category", "general")
    assert "general: 5 meet the criteria, 0 of them not served; to try:" in done.out
    assert f"against {FIRST}" in done.out
    assert "Not tried: 0 not served, 0 refused, 1 known" in done.out
    found = router("models", "search", "--dry-run", "--category", "general", "--json").json
    assert found["search"] is None
    assert found["plans"][0]["incumbent"] == FIRST
    assert router("models", "search", "--category", "poetry").code == 1


def test_a_review_on_the_command_line_sums_up_the_calls_and_decides(
    router: CommandLine, world: Searching
) -> None:
    log(world, bright_9b=0.05)
    assert "stays on probation" in router("models", "review", "--dry-run").out
    (decision,) = router("models", "review", "--json").json
    assert (decision["model"], decision["step"], world.roster()[NEW]) == (NEW, "promote", "active")
    assert router("models", "review").out == "No model is on probation.\n"


def test_an_invalid_file_does_not_block_other_commands(router: CommandLine, world: Searching) -> None:
    (world.folder / DISCOVERED).write_text("models: [\n")
    for verb in (("models",), ("models", "sync")):
        done = router(*verb)
        assert done.code == 0
        assert "discovered.yaml is not valid YAML" in done.err
    refused = router("models", "retire", NEW)
    assert (refused.code, "line 2" in refused.err) == (1, True)
    assert world.roster()[NEW] == "probation"


def test_models_yaml_cannot_contain_discovered_models(world: Searching) -> None:
    (world.folder / "models.yaml").write_text(yaml.safe_dump(models_yaml(discovered={})))
    with pytest.raises(Exception, match="discovered models are stored in discovered"):
        world.sync()
