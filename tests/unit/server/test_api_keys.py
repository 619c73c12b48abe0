"""API keys: created, checked, removed, and stored as hashes only."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from router.errors import ConfigError, InputError
from router.server.api_keys import ApiKeys, add_key, read_keys, remove_key


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "folder" / "api_keys"


def test_a_key_identifies_its_client_and_is_stored_as_a_hash(file: Path) -> None:
    alice, bob = add_key(file, "alice"), add_key(file, "bob")
    keys = ApiKeys(file)
    assert (keys.client(alice), keys.client(bob), keys.count) == ("alice", "bob", 2)
    assert [keys.client(wrong) for wrong in ("", alice[:-1], f"{alice} ", "\ud800")] == [None] * 4
    assert alice not in file.read_text()
    assert file.stat().st_mode & 0o077 == 0


def test_a_removed_key_is_rejected_after_reload(file: Path) -> None:
    key = add_key(file, "alice")
    keys = ApiKeys(file)
    remove_key(file, "alice")
    assert keys.client(key) == "alice"
    keys.reload()
    assert keys.client(key) is None
    with pytest.raises(InputError, match="'alice' has no key"):
        remove_key(file, "alice")


def test_an_invalid_file_leaves_the_keys_unchanged(file: Path) -> None:
    key = add_key(file, "alice")
    keys = ApiKeys(file)
    file.write_text("alice secret\n")
    with pytest.raises(ConfigError, match=r"api_keys:1: must be NAME sha256:HEX"):
        keys.reload()
    assert keys.client(key) == "alice"


def test_concurrent_changes_are_all_kept(file: Path) -> None:
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda n: add_key(file, f"client{n}"), range(40)))
    assert len(read_keys(file)) == 40
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_owner_and_mode_of_the_file_are_kept(file: Path) -> None:
    add_key(file, "alice")
    file.chmod(0o640)
    if os.geteuid() == 0:
        os.chown(file, 12345, 12345)
    owner = file.stat().st_uid
    remove_key(file, "alice")
    assert (file.stat().st_uid, file.stat().st_mode & 0o777) == (owner, 0o640)


def test_duplicate_clients_and_invalid_names_are_rejected(file: Path) -> None:
    add_key(file, "alice")
    with pytest.raises(InputError, match="already has a key"):
        add_key(file, "alice")
    for name in ("", "a b", "#a", "a\nb"):
        with pytest.raises(InputError, match="not a valid client name"):
            add_key(file, name)


def test_comments_are_allowed_and_duplicates_rejected(file: Path) -> None:
    add_key(file, "alice")
    line = file.read_text()
    file.write_text(f"# clients\n\n{line.strip()}  # since May\n")
    assert list(read_keys(file)) == ["alice"]
    file.write_text(line * 2)
    with pytest.raises(ConfigError, match=r":2: duplicate client 'alice'"):
        read_keys(file)


def test_a_key_from_the_environment() -> None:
    keys = ApiKeys(None, "x" * 20)
    assert (keys.client("x" * 20), keys.count) == ("ROUTER_API_KEY", 1)
    for bad in ("short", "x" * 19, "x" * 20 + " y", "ü" * 20):
        with pytest.raises(ConfigError, match="ROUTER_API_KEY") as caught:
            ApiKeys(None, bad)
        assert bad not in str(caught.value)
