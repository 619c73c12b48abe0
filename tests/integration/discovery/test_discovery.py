"""The search: admits the better candidate, refuses every kind of bad one, and can be undone."""

from __future__ import annotations

import json
import shutil
import tempfile
import threading
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import pytest
import yaml

from local.redis import RedisServer
from models_backend.process import BackendServer, start_backend
from router.database import connect, rows
from router.discovery.probation import promote, retire, undo_search
from router.discovery.publishing import publish_file, publish_variables
from router.discovery.search import SEARCH_LOCK, SearchBusy
from router.errors import AirflowError, BackendUnavailable, CatalogError, ConfigError, InputError
from router.settings.environment import Addresses
from router.settings.models import DISCOVERED
from tests.support.discovery import (
    CANDIDATES,
    ENTRY,
    FIRST,
    SECOND,
    FakeAirflow,
    Searching,
    fake_airflow,
    models_yaml,
    references,
    verdicts,
    write_catalog,
    write_config,
)
from tests.support.permissions import file_modes_apply

GOOD, BAD, BROKEN, GONE, EQUAL = CANDIDATES


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BackendServer]:
    folder = tmp_path_factory.mktemp("backend")
    (folder / "models.yaml").write_text(yaml.safe_dump(models_yaml()))
    also = [argument for name in CANDIDATES for argument in ("--also", f"{name}=0.1/0.1")]
    server = start_backend(
        folder, "--models", str(folder / "models.yaml"), *also, "--time-scale", "2000",
        "--references", str(references(folder)),
    )  # fmt: skip
    yield server
    server.stop()


@pytest.fixture
def airflow() -> Iterator[FakeAirflow]:
    with fake_airflow() as server:
        yield server


@pytest.fixture
def world(  # noqa: PLR0917 - fixtures
    database: str,
    redis_server: RedisServer,
    redis_client: object,
    backend: BackendServer,
    airflow: FakeAirflow,
    tmp_path: Path,
) -> Searching:
    """Two configured models, whose answers are good half the time, and candidates of each kind."""
    addresses = Addresses(database_url=database, redis_url=redis_server.url, backend_url=backend.url)
    write_config(tmp_path)
    world = Searching(addresses, tmp_path, backend, airflow)
    with connect(database) as connection:
        rows(connection, "DELETE FROM roster")
    world.sync()
    world.set_conditions(
        {"model": BROKEN, "failing": 1}, {"model": GONE, "served": False},
        steady_7b=0.5, quiet_7b=0.5, bright_9b=1.0, dull_9b=0.2, par_9b=0.5,
    )  # fmt: skip
    return world


def test_the_better_candidate_is_admitted_and_the_others_are_refused(world: Searching) -> None:
    report = world.search()
    assert verdicts(report) == {
        GOOD: "taken",
        BAD: "lost",
        BROKEN: "lost",
        GONE: "unreachable",
        EQUAL: "lost",
    }
    assert world.roster() == {FIRST: "active", SECOND: "active", GOOD: "probation"}
    assert world.airflow is not None
    assert world.airflow.variables == {f"traffic.{GOOD}": "60000/min, burst"}
    (row,) = world.query("SELECT * FROM rankings WHERE model = %s", GOOD)
    assert (row["category"], row["place"], row["standing"]) == ("general", 3, "trial")
    assert 0 < row["least_share"] == row["most_share"] < 0.05
    entry = world.discovered()[GOOD]
    assert (entry["state"], entry["ranks"]) == ("probation", {"general": 3})
    (change,) = entry["history"]
    assert (change["what"], change["by"]) == ("taken", "a test")
    assert f"better than {FIRST} for general" in change["why"]
    assert world.calls_of(GOOD) == world.calls_of(BAD) == world.calls_of(FIRST) == 30


def test_findings_events_and_grades_are_stored(world: Searching) -> None:
    report = world.search()
    stored = world.query("SELECT * FROM candidates WHERE search = %s", report.search)
    assert {row["model"]: row["verdict"] for row in stored} == verdicts(report)
    (won,) = [row["trial"] for row in stored if row["model"] == GOOD]
    assert won["candidate"]["score"] > won["incumbent"]["score"]
    assert won["lower"] > 0
    (event,) = world.query("SELECT * FROM roster_events")
    assert (event["model"], event["what"], event["search"]) == (GOOD, "taken", report.search)
    # Only the candidate's calls are graded as evidence; the incumbent's would count twice.
    graded = world.query("SELECT DISTINCT c.model FROM call_scores s JOIN model_calls c USING (call_id)")
    assert {row["model"] for row in graded} == {GOOD, BAD, EQUAL}


def test_a_second_search_does_nothing_new(world: Searching) -> None:
    world.search()
    before, calls = world.everything(), world.value("SELECT count(*) FROM model_calls")
    found = world.value("SELECT count(*) FROM candidates")
    assert verdicts(world.search()) == {GOOD: "known", GONE: "unreachable"}  # the others were tried recently
    assert world.everything() == before
    assert world.value("SELECT count(*) FROM model_calls") == calls
    assert world.value("SELECT count(*) FROM candidates") == found + 1  # the finding that it is known
    world.search()
    assert world.value("SELECT count(*) FROM candidates") == found + 1
    assert world.value("SELECT count(*) FROM roster_events") == 1


def test_a_second_attempt_of_the_same_run_tries_and_spends_nothing_more(world: Searching) -> None:
    began = world.value("SELECT clock_timestamp()")
    world.search(since=began)
    calls = world.value("SELECT count(*) FROM model_calls")
    world.query("UPDATE candidates SET verdict = 'unreachable' RETURNING 1")  # none counts as recently tried
    again = world.search(since=began)
    assert again.notes == ("general: an earlier attempt of this run has tried its candidates",)
    assert world.value("SELECT count(*) FROM model_calls") == calls
    (spent,) = world.query("SELECT cost_usd FROM trials_since(%s)", began)
    assert spent["cost_usd"] == pytest.approx(float(world.value("SELECT sum(cost) FROM model_calls")))
    world.query("UPDATE candidates SET at = at - interval '1 day' RETURNING 1")
    write_config(world.folder, budget_usd=float(spent["cost_usd"]))
    assert any("is used up" in note for note in world.search(since=began).notes)
    assert world.value("SELECT count(*) FROM model_calls") == calls


def test_a_loser_is_tried_again_after_retry_after_days(world: Searching) -> None:
    write_catalog(world.folder, {"name": BAD})
    world.search()
    world.query("UPDATE candidates SET at = at - interval '13 days' RETURNING 1")
    assert BAD not in verdicts(world.search())
    world.query("UPDATE candidates SET at = at - interval '2 days' RETURNING 1")
    world.set_conditions(dull_9b=1.0)
    assert verdicts(world.search()) == {BAD: "taken"}


def test_undo_restores_roster_variable_and_file_exactly(world: Searching) -> None:
    before = world.everything()
    world.search()
    after = world.everything()
    assert all(after[part] != before[part] for part in before)
    url, airflow = world.addresses.database_url, world.airflow
    assert airflow is not None
    (undone,) = undo_search(url, world.folder, by="a test", variables=airflow.api)
    assert (undone.model, undone.what, undone.notes) == (GOOD, "taken", ())
    assert world.everything() == before
    assert not (world.folder / DISCOVERED).exists()
    with pytest.raises(InputError, match="Nothing to undo"):
        undo_search(url, world.folder, by="a test", variables=airflow.api)
    # Neither the next search nor a sync brings it back.
    assert GOOD not in verdicts(world.search())
    world.sync()
    assert world.everything() == before


def test_undo_reverts_one_change_at_a_time(world: Searching) -> None:
    world.search()
    url, airflow = world.addresses.database_url, world.airflow
    assert airflow is not None
    airflow.variables[f"traffic.{GOOD}"] = "12/min"  # edited by an operator
    states = [world.everything()]
    promote(url, world.folder, GOOD, by="ann", variables=airflow.api)
    states.append(world.everything())
    assert (world.roster()[GOOD], world.discovered()[GOOD]["state"]) == ("active", "active")
    retire(url, world.folder, GOOD, by="ann", variables=airflow.api)
    assert world.roster()[GOOD] == "retired"
    assert f"traffic.{GOOD}" not in airflow.variables
    assert [change["what"] for change in world.discovered()[GOOD]["history"]] == [
        "taken",
        "promoted",
        "retired",
    ]
    while states:
        undo_search(url, world.folder, by="ann", model=GOOD, variables=airflow.api)
        assert world.everything() == states.pop()


def test_a_masked_variable_is_restored_from_the_target_in_use(world: Searching) -> None:
    airflow, url = world.airflow, world.addresses.database_url
    assert airflow is not None
    world.search()
    key = f"traffic.{GOOD}"
    airflow.is_masked = True
    airflow.variables[key] = "7/min, 2/s"
    with connect(url) as connection:
        rows(connection, "SELECT record_target(%s, '7/min, 2/s', 9000000000000000)", (GOOD,))
    retire(url, world.folder, GOOD, by="ann", variables=airflow.api)
    assert key not in airflow.variables
    undo_search(url, world.folder, by="ann", model=GOOD, variables=airflow.api)
    assert airflow.variables[key] == "7/min, 2/s"
    retire(url, world.folder, GOOD, by="ann", variables=airflow.api)
    with connect(url) as connection:  # as an earlier version stored it
        rows(connection, """UPDATE roster_events SET before = before || '{"variable": "***"}'""")
    undo_search(url, world.folder, by="ann", model=GOOD, variables=airflow.api)
    assert "***" not in airflow.variables.values()
    assert world.value("SELECT count(*) FROM roster_events WHERE NOT variable_done") == 0


def test_a_mask_is_never_written(world: Searching) -> None:
    assert world.airflow is not None
    for write in (world.airflow.api.set_variable, world.airflow.api.create_variable):
        with pytest.raises(InputError, match=r"traffic\.x is not set to \*\*\*, which Airflow shows"):
            write("traffic.x", " *** ")
    assert world.airflow.variables == {}


def test_an_existing_variable_is_preserved(world: Searching) -> None:
    assert world.airflow is not None
    world.airflow.variables[f"traffic.{GOOD}"] = "3/min"
    before = world.everything()
    world.search()
    assert world.airflow.variables == {f"traffic.{GOOD}": "3/min"}
    undo_search(world.addresses.database_url, world.folder, by="a test", variables=world.airflow.api)
    assert world.everything() == before


def test_undoing_a_search_includes_later_changes_of_its_models(world: Searching) -> None:
    write_catalog(world.folder, {"name": GOOD})
    before = world.everything()
    report = world.search("technical", "general")
    assert [finding.category for finding in report.admitted] == ["technical", "general"]
    assert world.discovered()[GOOD]["ranks"] == {"general": 3, "technical": 3}
    url, airflow = world.addresses.database_url, world.airflow
    assert airflow is not None
    promote(url, world.folder, GOOD, by="ann", variables=airflow.api)
    undone = undo_search(url, world.folder, by="ann", search=report.search, variables=airflow.api)
    assert [one.what for one in undone] == ["promoted", "taken", "taken"]
    assert world.everything() == before


def test_an_undone_model_does_not_return_from_a_stale_file(world: Searching) -> None:
    before = world.everything()
    world.search()
    left = (world.folder / DISCOVERED).read_bytes()
    assert world.airflow is not None
    undo_search(world.addresses.database_url, world.folder, by="a test", variables=world.airflow.api)
    (world.folder / DISCOVERED).write_bytes(left)  # as after a crash before the file was written
    world.sync()
    assert GOOD not in world.roster()
    world.search()
    assert world.everything() == before


@pytest.mark.parametrize("crashed_after", ["the database", "the file", "the Variable"])
def test_the_next_search_completes_what_a_crash_left(world: Searching, crashed_after: str) -> None:
    world.search()
    wanted = world.everything()
    # As after a crash there: the later steps were not done, or not recorded.
    assert world.airflow is not None
    if crashed_after == "the database":
        (world.folder / DISCOVERED).unlink()
    if crashed_after != "the Variable":
        world.airflow.variables.clear()
    world.query("UPDATE roster_events SET variable_done = false RETURNING 1")
    world.sync()  # a sync in between loses nothing
    assert world.roster()[GOOD] == "probation"
    world.search()
    assert world.everything() == wanted
    undo_search(world.addresses.database_url, world.folder, by="a test", variables=world.airflow.api)
    assert world.airflow.variables == {}


def test_publishing_is_idempotent(world: Searching) -> None:
    world.search()
    before = world.everything()
    assert world.airflow is not None
    with connect(world.addresses.database_url, autocommit=True) as connection:
        assert publish_file(connection, world.folder) is False
        assert publish_variables(connection, world.airflow.api) == []
    assert world.everything() == before


def test_without_airflow_the_variable_is_created_later(world: Searching) -> None:
    report = world.search(variables=None)
    assert report.admitted
    assert any("ROUTER_AIRFLOW_URL" in note for note in report.notes)
    assert world.airflow is not None
    assert world.airflow.variables == {}
    world.search()
    assert world.airflow.variables == {f"traffic.{GOOD}": "60000/min, burst"}
    undo_search(world.addresses.database_url, world.folder, by="a test", variables=world.airflow.api)
    assert world.airflow.variables == {}


def test_an_unavailable_airflow_is_reported_before_any_trial(world: Searching) -> None:
    assert world.airflow is not None
    world.airflow.is_down = True
    with pytest.raises(AirflowError):
        world.search()
    assert world.value("SELECT count(*) FROM model_calls") == 0


def test_a_dry_run_shows_candidates_and_sends_nothing(world: Searching) -> None:
    before = world.everything()
    report = world.search("creative", "general", dry_run=True)
    assert report.search is None
    plan = report.plans[1]
    assert (plan.category, plan.incumbent and plan.incumbent.name, len(plan.prompts)) == (
        "general",
        FIRST,
        30,
    )
    assert {model.name for model in plan.candidates} == set(CANDIDATES) - {GONE}
    assert {finding.model for finding in report.unserved} == {GONE}
    assert world.everything() == before
    assert world.value("SELECT count(*) FROM model_calls") == 0
    assert world.value("SELECT count(*) FROM searches") == 0


def test_only_the_best_of_two_winners_is_admitted(world: Searching) -> None:
    world.set_conditions(dull_9b=0.97)
    report = world.search()
    (admitted,) = report.admitted
    losers = [finding for finding in report.findings if f"{admitted.model} won by more" in finding.reason]
    assert {admitted.model, *(loser.model for loser in losers)} == {GOOD, BAD}
    assert {loser.verdict for loser in losers} == {"lost"}


def test_the_next_candidate_replaces_one_that_cannot_be_called(world: Searching) -> None:
    write_config(world.folder, {"name": GONE, "scores": {"mmlu-pro": 0.99}}, {"name": GOOD})
    settings = yaml.safe_load((world.folder / "search.yaml").read_text())
    settings["criteria"]["candidates"] = 1
    (world.folder / "search.yaml").write_text(yaml.safe_dump(settings))
    report = world.search()
    assert verdicts(report) == {GONE: "unreachable", GOOD: "taken"}
    assert [model.name for model in report.plans[0].candidates] == [GOOD]


def test_a_failing_candidate_costs_only_a_few_calls(world: Searching) -> None:
    write_config(world.folder, {"name": BROKEN}, max_concurrency=2)
    report = world.search()
    assert verdicts(report) == {BROKEN: "lost"}
    assert "none of its first calls was answered" in report.findings[0].reason
    assert world.calls_of(BROKEN) <= 6


def test_an_equal_candidate_is_not_admitted(world: Searching) -> None:
    write_catalog(world.folder, {"name": EQUAL})
    world.set_conditions(steady_7b=0.9, par_9b=0.9)
    assert verdicts(world.search()) == {EQUAL: "lost"}


def test_a_failing_incumbent_makes_the_trial_void(world: Searching) -> None:
    world.set_conditions({"model": FIRST, "failing": 1}, bright_9b=1.0)
    report = world.search()
    assert set(verdicts(report).values()) <= {"unreachable"}
    assert any("the incumbent answered only 0 of" in note for note in report.notes)
    assert world.value("SELECT count(*) FROM candidates WHERE verdict = 'lost'") == 0


def test_a_model_is_called_by_the_backends_spelling(world: Searching) -> None:
    write_catalog(world.folder, {"name": "maker/Bright_9B"}, {"name": "maker/nowhere-9b"})
    assert verdicts(world.search()) == {"bright_9b": "taken", "nowhere-9b": "unreachable"}
    assert world.discovered()["bright_9b"]["endpoint"] == GOOD


def test_an_empty_budget_ends_the_trials(world: Searching) -> None:
    write_config(world.folder, budget_usd=0)
    report = world.search()
    assert report.admitted == ()
    assert any("budget of 0 USD" in note for note in report.notes)
    assert world.value("SELECT count(*) FROM model_calls") == 0


def test_a_configured_model_is_never_a_candidate_in_any_spelling(world: Searching) -> None:
    entries = [
        {"name": FIRST},
        {"name": f"maker/{SECOND.upper()}-Instruct"},
        {"name": "x-9b", "endpoint": FIRST},
    ]
    write_catalog(world.folder, *entries)
    report = world.search()
    assert verdicts(report) == {FIRST: "known", f"{SECOND}-instruct": "known", "x-9b": "known"}


def test_a_model_added_to_models_yaml_during_the_trial_is_not_admitted(world: Searching) -> None:
    write_catalog(world.folder, {"name": GOOD})
    world.set_conditions({"model": GOOD, "quality": 1.0, "latency_factor": 300})
    written = models_yaml(FIRST, SECOND)
    written["models"][GOOD] = {"target": "1/min", "ranks": {"creative": 1}}

    def edit() -> None:
        while not world.calls_of(GOOD):
            pass
        (world.folder / "models.yaml").write_text(yaml.safe_dump(written))

    editing = threading.Thread(target=edit)
    editing.start()
    report = world.search()
    editing.join()
    assert verdicts(report) == {GOOD: "known"}
    assert not (world.folder / DISCOVERED).exists()
    world.sync()
    assert world.query("SELECT source, state, default_target FROM roster WHERE model = %s", GOOD) == [
        {"source": "people", "state": "active", "default_target": "1/min"}
    ]


def test_models_yaml_takes_over_a_discovered_model(world: Searching) -> None:
    world.search()
    written = models_yaml(FIRST, SECOND)
    written["models"][GOOD] = {"target": "1/min", "ranks": {"creative": 1}}
    text = yaml.safe_dump(written)
    (world.folder / "models.yaml").write_text(text)
    world.sync()
    (row,) = world.query("SELECT source, state, default_target FROM roster WHERE model = %s", GOOD)
    assert row == {"source": "people", "state": "active", "default_target": "1/min"}
    places = world.query("SELECT category, place, standing FROM rankings WHERE model = %s", GOOD)
    assert places == [{"category": "creative", "place": 1, "standing": "ranked"}]
    url = world.addresses.database_url
    for change in (promote, retire):
        with pytest.raises(InputError, match="was not found by a search"):
            change(url, world.folder, GOOD, by="ann")
    with pytest.raises(InputError, match="names the model"):
        undo_search(url, world.folder, by="ann", model=GOOD)
    world.search()
    assert (world.folder / "models.yaml").read_text() == text
    assert not (world.folder / DISCOVERED).exists()


def test_a_sync_keeps_discovered_models(world: Searching) -> None:
    world.search()
    before = world.everything()
    world.sync()
    assert world.everything() == before


def test_a_new_database_imports_discovered_models_from_the_file(world: Searching) -> None:
    write_catalog(world.folder, {"name": GOOD})
    world.search("general", "technical")
    url, before = world.addresses.database_url, world.discovered()
    with connect(url) as connection:
        rows(connection, "DELETE FROM roster")
        rows(connection, "TRUNCATE roster_events, candidates, searches")
    world.sync()
    assert world.roster() == {FIRST: "active", SECOND: "active", GOOD: "probation"}
    world.search()
    assert world.discovered() == before
    with connect(url) as connection:
        rows(connection, "DELETE FROM roster WHERE model = %s", (GOOD,))
        rows(connection, "TRUNCATE roster_events, candidates, searches")
    assert verdicts(world.search()) == {GOOD: "known"}  # not tried again before a sync
    assert world.discovered() == before
    assert world.airflow is not None
    promote(url, world.folder, GOOD, by="ann", variables=world.airflow.api)
    undo_search(url, world.folder, by="ann", model=GOOD, variables=world.airflow.api)
    assert world.discovered() == before
    undo_search(url, world.folder, by="ann", model=GOOD, variables=world.airflow.api)
    assert (GOOD in world.roster(), world.airflow.variables) == (False, {})


def test_concurrent_searches_are_refused(world: Searching) -> None:
    with connect(world.addresses.database_url, autocommit=True) as connection:
        rows(connection, "SELECT pg_advisory_lock(%s)", (SEARCH_LOCK,))
        with pytest.raises(SearchBusy, match="Another search is running"):
            world.search()
    assert world.value("SELECT count(*) FROM searches") == 0
    assert world.search().admitted


def test_a_read_only_folder_is_reported_before_any_trial(world: Searching) -> None:
    folder = Path(tempfile.mkdtemp(prefix="router-test-"))
    shutil.copy(world.folder / "models.yaml", folder)
    folder.chmod(0o555)
    search = world.prepared(folder)
    try:
        with (
            file_modes_apply(),
            pytest.raises(ConfigError, match=r"discovered\.yaml cannot be written: Permission denied"),
        ):
            search()
    finally:
        folder.chmod(0o755)
        shutil.rmtree(folder)


def test_an_invalid_file_is_reported_and_not_overwritten(world: Searching) -> None:
    world.search()
    path = world.folder / DISCOVERED
    broken = path.read_text().replace("state: probation", "state: [probation")
    path.write_text(broken)
    calls = world.value("SELECT count(*) FROM model_calls")
    with pytest.raises(ConfigError, match=r"(?s)discovered\.yaml is not valid YAML.*line \d+"):
        world.search()
    with pytest.raises(ConfigError, match="discovered"):
        retire(world.addresses.database_url, world.folder, GOOD, by="ann")
    assert path.read_text() == broken
    assert world.value("SELECT count(*) FROM model_calls") == calls
    # The router still starts, with the configured models and those of Postgres.
    assert set(world.config.models) == {FIRST, SECOND}
    assert "discovered.yaml" in (world.config.discovered_problem or "")
    world.sync()
    assert world.roster()[GOOD] == "probation"
    path.unlink()
    world.search()
    assert set(world.discovered()) == {GOOD}


def test_invalid_entries_are_refused_and_stored_once(world: Searching) -> None:
    invalid = [
        {"name": GOOD, "input_price": -1}, {"name": BAD, "parameters": 0}, {"name": "../../etc/passwd"},
        {"name": EQUAL, "released": "2999-01-01"}, {"name": "no\0thing"}, {"name": BROKEN, "license": None},
    ]  # fmt: skip
    write_catalog(world.folder, *invalid)
    report = world.search()
    assert {finding.verdict for finding in report.findings} == {"refused"}
    assert len(report.findings) == len(invalid)
    stored = world.value("SELECT count(*) FROM candidates")
    world.search()
    assert world.value("SELECT count(*) FROM candidates") == stored == len(invalid)
    assert world.value("SELECT count(*) FROM model_calls") == 0


def test_invalid_input_and_unavailable_services_are_reported(world: Searching) -> None:
    with pytest.raises(InputError, match="There is no category 'poetry'"):
        world.search("poetry")
    (world.folder / "catalogue.json").write_text("{")
    with pytest.raises(CatalogError, match=r"catalogue\.json"):
        world.search()
    write_catalog(world.folder)
    away = world.addresses.model_copy(update={"backend_url": "http://127.0.0.1:9"})
    with pytest.raises(BackendUnavailable):
        Searching(away, world.folder, world.backend).search()
    assert world.roster() == {FIRST: "active", SECOND: "active"}


def test_without_prompts_or_an_incumbent_there_are_no_trials(world: Searching) -> None:
    trials = world.folder / "trials"
    trials.mkdir()
    (trials / "general.jsonl").write_text("not a prompt\n")
    report = world.search("general")
    assert any("general.jsonl, line 1" in note for note in report.notes)
    world.query("UPDATE roster SET state = 'paused' RETURNING 1")
    report = world.search("technical")
    assert any("no active model to compare with" in note for note in report.notes)
    assert world.value("SELECT count(*) FROM model_calls") == 0


def test_the_age_criterion_uses_the_current_date(world: Searching) -> None:
    settings = yaml.safe_load((world.folder / "search.yaml").read_text())
    settings["criteria"]["age_days_max"] = 30
    (world.folder / "search.yaml").write_text(yaml.safe_dump(settings))
    assert json.dumps(ENTRY["released"]) == '"2026-01-01"'
    old = world.search(dry_run=True, today=date(2026, 3, 1))
    assert set(verdicts(old).values()) == {"refused"}
    young = world.search(dry_run=True, today=date(2026, 1, 20))
    assert len(young.plans[0].candidates) == len(CANDIDATES) - 1  # one is not served
