"""config/discovered.yaml: atomic, locked and deterministic writes; invalid files."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import yaml

from router.discovery import discovered_file as discovered
from router.discovery.discovered_file import rendered, write_discovered, writing
from router.errors import ConfigError
from router.settings.models import DISCOVERED, read_discovered
from router.settings.router import load_config

PEOPLE = {"models": {"phi-4": {"target": "1/min", "ranks": {"general": 1}}}}


def row(model: str = "llama-9", at: str = "2026-01-02T03:04:05.000006+00:00", **more: Any) -> dict[str, Any]:
    return {
        "model": model,
        "endpoint": model,
        "state": "probation",
        "default_target": "6/min",
        "ranks": {"general": 3},
        "context_tokens": 8192,
        "max_tokens": 512,
        "timeout_seconds": 180.0,
        "input_price": 0.1,
        "output_price": 0.2,
        "history": [{"what": "taken", "at": at, "by": "ann", "why": "it won: \u00e4 # 'x'\nline"}],
        **more,
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "models.yaml").write_text(yaml.safe_dump(PEOPLE))
    return tmp_path


def test_a_written_file_can_be_read(folder: Path) -> None:
    assert write_discovered(folder, [row()])
    models, problem = read_discovered(folder)
    assert problem is None
    found = models["llama-9"]
    assert (found.state, found.target, found.ranks) == ("probation", "6/min", {"general": 3})
    assert found.history[0].why == "it won: \u00e4 # 'x'\nline"
    assert load_config(folder).discovered == models
    assert (folder / DISCOVERED).read_text().startswith("# The models that the search found")


def test_rendering_is_deterministic_and_ordered_by_admission() -> None:
    one, two = row("b"), row("a", at="2026-01-03T00:00:00.000000+00:00")
    assert rendered([one, two]) == rendered([two, one])
    assert list(yaml.safe_load(rendered([two, one]))["models"]) == ["b", "a"]


def test_an_unchanged_file_is_not_written(folder: Path) -> None:
    write_discovered(folder, [row()])
    inode = (folder / DISCOVERED).stat().st_ino
    assert not write_discovered(folder, [row()])
    assert (folder / DISCOVERED).stat().st_ino == inode
    assert write_discovered(folder, [])
    assert not (folder / DISCOVERED).exists()
    assert not write_discovered(folder, [])


def test_a_crash_while_writing_leaves_the_old_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_discovered(folder, [row()])
    before = (folder / DISCOVERED).read_bytes()

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("router.files.os.fsync", crash)
    with pytest.raises(KeyboardInterrupt):
        write_discovered(folder, [row(), row("other")])
    assert (folder / DISCOVERED).read_bytes() == before
    assert {path.name for path in folder.iterdir()} == {
        DISCOVERED,
        "models.yaml",
    }


def test_writers_exclude_each_other(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entered, first_may_end = threading.Event(), threading.Event()
    order = []

    def write(name: str) -> None:
        with writing(folder):
            order.append(f"{name} begins")
            entered.set()
            first_may_end.wait(10)
            order.append(f"{name} ends")

    first = threading.Thread(target=write, args=("first",))
    first.start()
    entered.wait(10)
    monkeypatch.setattr(discovered, "LOCK_SECONDS", 0.1)
    with pytest.raises(ConfigError, match="Another process is writing"), writing(folder):
        pass
    monkeypatch.setattr(discovered, "LOCK_SECONDS", 10.0)
    second = threading.Thread(target=write, args=("second",))
    second.start()
    first_may_end.set()
    first.join()
    second.join()
    assert order == ["first begins", "first ends", "second begins", "second ends"]


def test_other_users_may_read_the_file(folder: Path) -> None:
    write_discovered(folder, [row()])
    assert (folder / DISCOVERED).stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("models: [", "is not valid YAML"),
        ("models:\n  a: {}\n  a: {}\n", "duplicate key 'a'"),
        ("", "must be a mapping"),
        ("models:\n  ../x: {}\n", "this key must match pattern"),
        (rendered([row(state="fine")]), "models.llama-9.state"),
        (rendered([row(default_target="quickly")]), "models.llama-9.target"),
        (rendered([row(history=[])]), "models.llama-9.history"),
        ("\udc80", "cannot be read as UTF-8"),
    ],
)
def test_an_invalid_file_is_reported_but_does_not_prevent_loading_the_config(
    folder: Path, text: str, words: str
) -> None:
    (folder / DISCOVERED).write_bytes(text.encode("utf-8", "surrogateescape"))
    config = load_config(folder)
    assert (set(config.models), config.discovered) == ({"phi-4"}, {})
    assert str(folder / DISCOVERED) in (config.discovered_problem or "")
    assert words in (config.discovered_problem or "")
    with pytest.raises(ConfigError, match=DISCOVERED):
        discovered.require_writable(folder)


def test_models_yaml_takes_precedence(folder: Path) -> None:
    write_discovered(folder, [row(), row("phi-4")])
    config = load_config(folder)
    assert set(config.models) == {"phi-4"}
    assert set(config.discovered) == {"llama-9"}
