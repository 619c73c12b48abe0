"""config/models.yaml: what is shipped loads, and what is wrong is refused with file and key."""

from __future__ import annotations

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


def refusal(folder: Path, content: str | bytes) -> str:
    """What ConfigError says of a models.yaml with this content."""
    path = folder / "models.yaml"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ConfigError) as caught:
        load_config(folder)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_the_shipped_file_loads_with_ten_models() -> None:
    config = load_config()
    assert len(config.models) == 10
    for category in config.categories:
        ranks = sorted(model.ranks[category] for model in config.models.values())
        assert ranks == list(range(1, 11)), category


def test_the_shipped_targets_use_the_whole_grammar_and_no_limit_is_idle() -> None:
    targets = [TrafficTarget.parse(model.target) for model in load_config().models.values()]
    rates = [target.requests_per_second() or 0 for target in targets]
    assert sum(rates) * 60 == pytest.approx(500)
    assert sum(any(limit.window_seconds == 1 for limit in target.requests) for target in targets) == 2
    assert sum(bool(target.tokens) for target in targets) == 1
    assert sum(target.at_once is not None for target in targets) == 2
    assert not any(target.warnings for target in targets)


def test_the_shipped_file_writes_down_the_defaults_and_explains_each_key() -> None:
    text = SHIPPED.read_text(encoding="utf-8")
    data = yaml.safe_load(text)
    assert BackendSettings.model_validate(data["backend"]) == BackendSettings()
    assert WorkerSettings.model_validate(data["worker"]) == WorkerSettings()
    elsewhere = {"categories", "default_category", "classification", "discovered", "discovered_problem"}
    assert set(data) == set(RouterConfig.model_fields) - elsewhere
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
        (MODEL + "default_category: general\n", "default_category"),  # named in categories.yaml
        (MODEL + "categories: [general]\n", "categories"),
        (MODEL.replace("general", "poetry"), "models.m.ranks.poetry"),
        (MODEL.replace("  m:", "  a b:"), "models.'a b'"),
        (MODEL.replace("1/s", "1 a fortnight"), "models.m.target"),
        ("models:\n  m: {ranks: {general: 1}}\n", "models.m.target"),
        ("worker: {}\n", "models"),
    ],
)
def test_a_wrong_key_or_value_is_named_with_its_path(tmp_path: Path, content: str, key: str) -> None:
    assert f": {key}: " in refusal(tmp_path, content) or f" {key}: " in refusal(tmp_path, content)


def test_a_wrong_target_shows_the_grammar(tmp_path: Path) -> None:
    assert "requests in any minute" in refusal(tmp_path, MODEL.replace("1/s", "lots"))


@pytest.mark.parametrize(
    "content", [MODEL + "  m:\n    target: 2/s\n", MODEL + MODEL, MODEL + "    target: 2/s\n"]
)
def test_a_key_that_stands_twice_is_refused_with_its_line(tmp_path: Path, content: str) -> None:
    words = refusal(tmp_path, content)
    assert "stands twice" in words
    assert "line 5" in words


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("models: [", "not valid YAML"),
        ("models:\n\t- x\n", "not valid YAML"),
        ("target: {{ x }}\n", "a key must be a word"),
        ("released: 2026-13-45\n", "not valid YAML"),
        ("!!python/object/apply:os.system ['true']", "not valid YAML"),
        (b"models: \xff\xfe", "cannot be read as UTF-8"),
        ("", "keys and values at its top"),
        ("- a\n- b\n", "keys and values at its top"),
    ],
)
def test_what_is_no_config_at_all_is_refused(tmp_path: Path, content: str | bytes, words: str) -> None:
    assert words in refusal(tmp_path, content)


def test_a_file_that_is_not_there_is_named_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="ROUTER_CONFIG") as caught:
        load_config(tmp_path)
    assert str(tmp_path / "models.yaml") in str(caught.value)


def test_the_folder_comes_from_the_environment() -> None:
    assert config_folder({"ROUTER_CONFIG": "/etc/router"}) == Path("/etc/router")
    assert config_folder({}) == DEFAULT_CONFIG_FOLDER


def test_addresses_are_read_whole_or_refused_and_never_shown() -> None:
    names = ("ROUTER_DATABASE_URL", "ROUTER_REDIS_URL", "MODELS_BACKEND_URL")
    environment = {name: f"scheme://user:hidden@{name}" for name in names}
    assert "hidden" not in repr(addresses_from_environment(environment))
    for name in names:
        with pytest.raises(ConfigError, match=name):
            addresses_from_environment({**environment, name: " "})


@pytest.mark.parametrize(
    "url", ["postgresql+psycopg2://router:SECRET@h/db", "postgresql://router:SECRET%zz@h/db"]
)
def test_a_database_url_that_is_none_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(ConfigError, match="ROUTER_DATABASE_URL") as refused, connect(url):
        pass
    assert "SECRET" not in str(refused.value)
    assert refused.value.__suppress_context__


def test_removed_key_is_accepted_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "models.yaml").write_text(MODEL + "backend: {paths: {single: /x, health: /up}}\n")
    assert load_config(tmp_path).backend.paths.single == "/x"
    assert "health is no longer used; remove it" in caplog.text
