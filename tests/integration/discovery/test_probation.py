"""Models on probation: promoted or retired by their log, and by people."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from models_backend.process import BackendServer
from router.database import connect, open_pool, rows
from router.discovery import store as candidates
from router.discovery.probation import Decision, promote, retire, review_probation, undo_search
from router.discovery.probation_rules import Step
from router.discovery.store import take
from router.discovery.trials import TrialModel
from router.errors import InputError
from router.models.roster import read_roster
from router.settings.discovery import load_discovery
from router.settings.environment import Addresses
from router.settings.learning import load_learning
from router.settings.models import DISCOVERED
from router.workers.assignment import PullOrder, Work, bounds
from tests.support.command_line import CommandLine
from tests.support.discovery import FIRST, SECOND, Searching, people, write_config
from tests.support.reviews import Log

NEW = "bright-9b"
NOWHERE = "http://127.0.0.1:1"


@pytest.fixture
def world(database: str, tmp_path: Path) -> Searching:
    """People's two models, and one on probation for general, whose calls the log can be made to tell of."""
    addresses = Addresses(database_url=database, redis_url=NOWHERE, backend_url=NOWHERE)
    write_config(tmp_path)
    backend: BackendServer = None  # type: ignore[assignment]  # nobody is called
    world = Searching(addresses, tmp_path, backend)
    with connect(database) as connection:
        rows(connection, "DELETE FROM roster")
    world.sync()
    taken_on(world, "general")
    return world


def taken_on(world: Searching, *categories: str) -> None:
    """What a search does when its candidate has won."""
    model = candidates.RosterModel(
        model=NEW,
        endpoint=NEW,
        state="probation",
        max_tokens=500,
        timeout_seconds=60.0,
        default_target="6/min",
    )
    with connect(world.addresses.database_url) as connection:
        number = candidates.begin_search(connection, "a test")
        for category in categories:
            event = take(
                connection, number, TrialModel(model, 0.1, 0.1), context_tokens=None, category=category,
                by="a test", why="it won", share=0.025, known={},
            )  # fmt: skip
            assert event is not None


def log(world: Searching, **bad: float) -> Log:
    """200 calls of each model today, of whose answers a share is empty."""
    log = Log(world.addresses.database_url)
    for model, share in {FIRST: 0.3, SECOND: 0.3, NEW: 0.3, **bad}.items():
        log.add(model.replace("_", "-"), 200, bad_answers=share)
    return log


def decided(world: Searching, **options: bool) -> Decision:
    config = world.config
    (decision,) = review_probation(
        world.addresses.database_url, world.folder, config, load_learning(world.folder, config.categories),
        load_discovery(world.folder, config.categories), by="the night", **options,
    )  # fmt: skip
    return decision


def test_one_that_is_good_is_promoted(world: Searching) -> None:
    log(world, bright_9b=0.05).review()
    assert decided(world, dry_run=True).step is Step.PROMOTE
    assert world.roster()[NEW] == "probation"
    decision = decided(world)
    assert (decision.step, world.roster()[NEW]) == (Step.PROMOTE, "active")
    assert "general: its bound is" in decision.reason
    entry = world.discovered()[NEW]
    assert [change["what"] for change in entry["history"]] == ["taken", "promoted"]
    assert entry["history"][1]["why"] == decision.reason
    # From the next review on it is ranked as any other, and may be first.
    Log(world.addresses.database_url).review()
    (row,) = world.query("SELECT place, most_share FROM rankings WHERE model = %s", NEW)
    assert row == {"place": 1, "most_share": 1.0}


@pytest.mark.parametrize("bad", [0.6, 1.0])
def test_one_that_is_surely_worse_is_retired(world: Searching, bad: float) -> None:
    log(world, bright_9b=bad).review()
    assert (decided(world).step, world.roster()[NEW]) == (Step.RETIRE, "retired")
    assert world.query("SELECT FROM rankings WHERE model = %s", NEW) == []
    assert world.discovered()[NEW]["state"] == "retired"


def test_with_few_calls_nothing_is_decided_until_the_nights_are_over(world: Searching) -> None:
    log = Log(world.addresses.database_url)
    for model, calls in ((FIRST, 200), (SECOND, 200), (NEW, 20)):
        log.add(model, calls)
    log.review()
    decision = decided(world)
    assert (decision.step, decision.reason) == (Step.STAY, "general: 20 of 60 calls")
    assert not (world.folder / DISCOVERED).exists()
    older = "UPDATE {} SET {} = {} - interval '15 days' RETURNING 1"
    world.query(older.format("roster_events", "at", "at"))
    world.query(older.format("roster", "changed_at", "changed_at"))
    decision = decided(world)
    assert decision.step is Step.RETIRE
    assert decision.reason.startswith("not proved within 14 nights; general: 20 of 60 calls")


def test_what_people_set_back_is_left_alone(world: Searching) -> None:
    log(world, bright_9b=0.05).review()
    decided(world)
    undo_search(world.addresses.database_url, world.folder, by="ann", model=NEW)
    assert world.roster()[NEW] == "probation"
    decision = decided(world)
    assert (decision.step, decision.reason) == (Step.STAY, "somebody set it back; left alone for 3 nights")


def test_a_category_that_would_retire_it_is_left_when_another_promotes_it(world: Searching) -> None:
    undo_search(world.addresses.database_url, world.folder, by="ann")
    taken_on(world, "general", "technical")
    told = log(world, bright_9b=0.05)
    for model, share in ((FIRST, 0.3), (SECOND, 0.3), (NEW, 0.9)):
        told.add(model, 200, category="technical", bad_answers=share)
    told.review()
    assert decided(world).step is Step.PROMOTE
    places = world.query("SELECT category FROM rankings WHERE model = %s", NEW)
    assert [row["category"] for row in places] == ["general"]
    assert world.discovered()[NEW]["ranks"] == {"general": 3}


async def test_on_probation_it_gets_its_share_where_it_was_taken_on_and_nothing_elsewhere(
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


def test_people_may_promote_and_retire_only_what_the_search_found(world: Searching) -> None:
    url, folder = world.addresses.database_url, world.folder
    with pytest.raises(InputError, match="There is no model 'nobody'"):
        promote(url, folder, "nobody", by="ann")
    with pytest.raises(InputError, match="not the search's but people's"):
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
            "ROUTER_REDIS_URL": NOWHERE,
            "MODELS_BACKEND_URL": NOWHERE,
            "ROUTER_CONFIG": str(world.folder),
        }
    )


def test_the_command_line_shows_and_changes_them(router: CommandLine, world: Searching) -> None:
    shown = router("models")
    assert shown.code == 0
    assert NEW in shown.out
    assert "probation" in shown.out
    assert "by a test: it won" in shown.out
    assert router("models", "--json").json[NEW]["source"] == "search"
    promoted = router("models", "promote", NEW, "--by", "ann")
    assert promoted.out.startswith(f"{NEW}: promoted")
    assert router("models", "undo", NEW).out.startswith(f"{NEW}: promoted is set back")
    retired = router("models", "retire", NEW, "--json").json
    assert (retired["model"], retired["step"]) == (NEW, "retire")
    assert [one["what"] for one in router("models", "undo", "--json").json] == ["retired", "taken"]
    refused = router("models", "undo")
    assert (refused.code, "nothing to set back" in refused.err) == (1, True)


def test_a_dry_run_on_the_command_line_names_who_would_be_tried(
    router: CommandLine, world: Searching
) -> None:
    said = router("models", "search", "--dry-run", "--category", "general")
    assert "general: 5 meet the criteria; would be tried:" in said.out
    assert f"against {FIRST}" in said.out
    assert "refused: 0, known already: 1" in said.out
    found = router("models", "search", "--dry-run", "--category", "general", "--json").json
    assert found["search"] is None
    assert found["plans"][0]["incumbent"] == FIRST
    assert router("models", "search", "--category", "poetry").code == 1


def test_a_broken_file_is_told_and_keeps_nobody_from_working(router: CommandLine, world: Searching) -> None:
    (world.folder / DISCOVERED).write_text("models: [\n")
    for verb in (("models",), ("models", "sync")):
        said = router(*verb)
        assert said.code == 0
        assert "discovered.yaml is not valid YAML" in said.err
    refused = router("models", "retire", NEW)
    assert (refused.code, "line 2" in refused.err) == (1, True)
    assert world.roster()[NEW] == "probation"


def test_the_file_is_not_written_by_people(world: Searching) -> None:
    """A key of models.yaml cannot smuggle in what the search found."""
    (world.folder / "models.yaml").write_text(yaml.safe_dump(people(discovered={})))
    with pytest.raises(Exception, match="discovered models are stored in discovered"):
        world.sync()
