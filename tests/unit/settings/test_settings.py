"""config/models.yaml: the shipped file loads, and errors are reported with file and key."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml

from router.database import connect
from router.errors import ConfigError
from router.settings.environment import DEFAULT_CONFIG_FOLDER, addresses_from_environment, config_folder
from router.settings.models import ModelSettings
from router.settings.router import (
    BackendFields,
    BackendPaths,
    BackendSettings,
    RouterConfig,
    WorkerSettings,
    load_config,
)
from router.traffic import TrafficTarget

MODEL = "models:\n  m:\n    target: 1/s\n    ranks: {general: 1}\n"
SHIPPED = DEFAULT_CONFIG_FOLDER / "models.yaml"


def error_of(folder: Path, content: str | bytes) -> str:
    """Returns the message of the ConfigError that a models.yaml with this content raises."""
    path = folder / "models.yaml"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ConfigError) as caught:
        load_config(folder)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_shipped_file_has_ten_models() -> None:
    config = load_config()
    assert len(config.models) == 10
    for category in config.categories:
        ranks = sorted(model.ranks[category] for model in config.models.values())
        assert ranks == list(range(1, 11)), category


def test_shipped_targets_use_the_whole_grammar_without_warnings() -> None:
    targets = [TrafficTarget.parse(model.target) for model in load_config().models.values()]
    rates = [target.requests_per_second() or 0 for target in targets]
    assert sum(rates) * 60 == pytest.approx(500)
    assert sum(any(limit.window_seconds == 1 for limit in target.requests) for target in targets) == 2
    assert sum(bool(target.tokens) for target in targets) == 1
    assert sum(target.at_once is not None for target in targets) == 2
    assert not any(target.warnings for target in targets)


def test_shipped_file_contains_every_key_with_its_default() -> None:
    text = SHIPPED.read_text(encoding="utf-8")
    data = yaml.safe_load(text)
    assert BackendSettings.model_validate(data["backend"]) == BackendSettings()
    assert WorkerSettings.model_validate(data["worker"]) == WorkerSettings()
    elsewhere = {"categories", "default_category", "classification", "discovered", "discovered_problem"}
    assert set(data) == set(RouterConfig.model_fields) - elsewhere - {"tasks"}
    assert "\n# tasks:\n" in text  # an example only
    assert set(data["models"]["llama-3.1-8b"]) == set(ModelSettings.model_fields)
    for kind in (BackendSettings, WorkerSettings):
        assert set(data[kind.__name__.removesuffix("Settings").lower()]) == set(kind.model_fields)
    assert set(data["backend"]["paths"]) == set(BackendPaths.model_fields)
    assert set(data["backend"]["fields"]) == set(BackendFields.model_fields)


@pytest.mark.parametrize(
    ("content", "key"),
    [
        (MODEL + "colour: red\n", "colour"),
        (MODEL + "    colour: red\n", "models.m.colour"),
        (MODEL + "backend: {paths: {sinlge: /x}}\n", "backend.paths.sinlge"),
        (MODEL + "worker: {look_ahead_seconds: 3}\n", "worker.look_ahead_seconds"),
        (MODEL + "    timeout_seconds: soon\n", "models.m.timeout_seconds"),
        (MODEL + "    state: asleep\n", "models.m.state"),
        (MODEL + "default_category: general\n", "default_category"),  # defined in categories.yaml
        (MODEL + "categories: [general]\n", "categories"),
        (MODEL.replace("general", "poetry"), "models.m.ranks.poetry"),
        (MODEL.replace("  m:", "  a b:"), "models.'a b'"),
        (MODEL.replace("1/s", "1 a fortnight"), "models.m.target"),
        ("models:\n  m: {ranks: {general: 1}}\n", "models.m.target"),
        ("worker: {}\n", "models"),
    ],
)
def test_invalid_key_or_value_is_reported_with_its_path(tmp_path: Path, content: str, key: str) -> None:
    assert f": {key}: " in error_of(tmp_path, content) or f" {key}: " in error_of(tmp_path, content)


def test_invalid_target_shows_the_grammar(tmp_path: Path) -> None:
    assert "requests in any minute" in error_of(tmp_path, MODEL.replace("1/s", "lots"))


@pytest.mark.parametrize(
    "content", [MODEL + "  m:\n    target: 2/s\n", MODEL + MODEL, MODEL + "    target: 2/s\n"]
)
def test_duplicate_key_is_reported_with_its_line(tmp_path: Path, content: str) -> None:
    words = error_of(tmp_path, content)
    assert "duplicate key" in words
    assert "line 5" in words


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("models: [", "not valid YAML"),
        ("models:\n\t- x\n", "not valid YAML"),
        ("target: {{ x }}\n", "a key must be a scalar"),
        ("released: 2026-13-45\n", "not valid YAML"),
        ("!!python/object/apply:os.system ['true']", "not valid YAML"),
        (b"models: \xff\xfe", "cannot be read as UTF-8"),
        ("", "must be a mapping of keys to values"),
        ("- a\n- b\n", "must be a mapping of keys to values"),
    ],
)
def test_file_that_is_not_a_config_is_reported(tmp_path: Path, content: str | bytes, words: str) -> None:
    assert words in error_of(tmp_path, content)


def test_missing_file_is_reported_with_a_hint(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="ROUTER_CONFIG") as caught:
        load_config(tmp_path)
    assert str(tmp_path / "models.yaml") in str(caught.value)


def test_config_folder_comes_from_the_environment() -> None:
    assert config_folder({"ROUTER_CONFIG": "/etc/router"}) == Path("/etc/router")
    assert config_folder({}) == DEFAULT_CONFIG_FOLDER


def test_addresses_are_required_and_hidden_in_repr() -> None:
    names = ("ROUTER_DATABASE_URL", "ROUTER_REDIS_URL", "MODELS_BACKEND_URL")
    environment = dict(zip(names, ("postgresql://u:hidden@h", "redis://u:hidden@h", "http://h"), strict=True))
    assert "hidden" not in repr(addresses_from_environment(environment))
    for name in names:
        with pytest.raises(ConfigError, match=name):
            addresses_from_environment({**environment, name: " "})


@pytest.mark.parametrize(
    "url",
    ["mysql://router:SECRET@h/db", "postgresql://router:SECRET%zz@h/db", "postgresql://router:SECRET%ff@h"],
)
def test_invalid_database_url_is_reported_without_its_password(url: str) -> None:
    with pytest.raises(ConfigError, match="ROUTER_DATABASE_URL") as refused, connect(url):
        pass
    assert "SECRET" not in str(refused.value)
    assert refused.value.__cause__ is None


def test_removed_key_is_accepted_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "models.yaml").write_text(MODEL + "backend: {paths: {single: /x, health: /up}}\n")
    assert load_config(tmp_path).backend.paths.single == "/x"
    assert "health is no longer used; remove it" in caplog.text


def clients(folder: Path, lines: str) -> RouterConfig:
    """Returns the config with these clients."""
    (folder / "models.yaml").write_text(f"{MODEL}clients: {{{lines}}}\n")
    return load_config(folder)


def test_an_unnamed_client_has_weight_1_and_no_limit() -> None:
    config = load_config()
    assert (config.client("alice").weight, config.client("").limit) == (1.0, None)


def test_a_client_has_the_values_of_default_that_its_entry_does_not_set(tmp_path: Path) -> None:
    named = "default: {weight: 2, limit: 60/min}, alice: {weight: 5}, bob: {limit: null}, '': {weight: 0.5}"
    config = clients(tmp_path, named)
    found = {name: config.client(name) for name in ("alice", "bob", "", "carol")}
    assert {name: (one.weight, one.limit) for name, one in found.items()} == {
        "alice": (5, "60/min"), "bob": (2, None), "": (0.5, "60/min"), "carol": (2, "60/min")
    }  # fmt: skip


@pytest.mark.parametrize(
    ("lines", "key"),
    [
        ("alice: {weight: 0}", "clients.alice.weight"),
        ("alice: {weight: 1001}", "clients.alice.weight"),
        ("alice: {limit: lots}", "clients.alice.limit"),
        ("alice: {share: 1}", "clients.alice.share"),
        ("two words: {weight: 1}", "clients.two words"),
        (".hidden: {weight: 1}", "clients..hidden"),
    ],
)
def test_an_invalid_client_is_reported_with_its_path(tmp_path: Path, lines: str, key: str) -> None:
    assert key in error_of(tmp_path, f"{MODEL}clients: {{{lines}}}\n")


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("off", "off"),
        ("false", "off"),
        ('"off"', "off"),
        ("own client", "own_client"),
        ("own_client", "own_client"),
        ("all", "all"),
    ],
)
def test_whose_tasks_are_knowledge_is_read_as_yaml_writes_it(tmp_path: Path, line: str, value: str) -> None:
    shutil.copytree(DEFAULT_CONFIG_FOLDER, tmp_path / "config")
    file = tmp_path / "config" / "models.yaml"
    file.write_text(file.read_text().replace("tasks: own_client", f"tasks: {line}"))
    assert load_config(file.parent).knowledge.tasks == value
