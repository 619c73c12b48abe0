"""API keys: created, checked, removed, and stored as hashes only."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from router.errors import ConfigError, InputError
from router.server.api_keys import ApiKeys
from router.server.key_file import (
    add_key,
    read_keys,
    read_last_used,
    remove_keys,
)
from router.traffic import TrafficTarget


def client(keys: ApiKeys, key: str) -> str | None:
    found = keys.find(key)
    return found and found.client


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "folder" / "api_keys"


def test_a_key_identifies_its_client_and_is_stored_as_a_hash(file: Path) -> None:
    alice, bob = add_key(file, "alice"), add_key(file, "bob")
    keys = ApiKeys(file)
    assert (client(keys, alice), client(keys, bob), keys.count) == ("alice", "bob", 2)
    assert [client(keys, wrong) for wrong in ("", alice[:-1], f"{alice} ", "\ud800")] == [None] * 4
    assert alice not in file.read_text()
    assert file.stat().st_mode & 0o077 == 0


def test_a_removed_key_is_rejected_after_reload(file: Path) -> None:
    key = add_key(file, "alice")
    keys = ApiKeys(file)
    remove_keys(file, "alice")
    assert client(keys, key) == "alice"
    keys.reload()
    assert client(keys, key) is None
    with pytest.raises(InputError, match="'alice' has no key"):
        remove_keys(file, "alice")


def test_an_invalid_file_leaves_the_keys_unchanged(file: Path) -> None:
    key = add_key(file, "alice")
    keys = ApiKeys(file)
    file.write_text("alice secret\n")
    with pytest.raises(ConfigError, match=r"api_keys:1: must be NAME sha256:HEX"):
        keys.reload()
    assert client(keys, key) == "alice"


def test_concurrent_changes_are_all_kept(file: Path) -> None:
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda n: add_key(file, f"client{n}"), range(40)))
    assert len({key.client for key in read_keys(file)}) == 40
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_owner_and_mode_of_the_file_are_kept(file: Path) -> None:
    add_key(file, "alice")
    file.chmod(0o640)
    if os.geteuid() == 0:
        os.chown(file, 12345, 12345)
    owner = file.stat().st_uid
    remove_keys(file, "alice")
    assert (file.stat().st_uid, file.stat().st_mode & 0o777) == (owner, 0o640)


def test_duplicate_clients_and_invalid_names_are_rejected(file: Path) -> None:
    add_key(file, "alice")
    with pytest.raises(InputError, match="already has a key"):
        add_key(file, "alice")
    for name in ("", "a b", "#a", "a\nb"):
        with pytest.raises(InputError, match="not a valid client name"):
            add_key(file, name)


def test_comments_are_allowed_and_a_key_cannot_belong_to_two_clients(file: Path) -> None:
    add_key(file, "alice", models=["phi-4"])
    line = file.read_text()
    file.write_text(f"# clients\n\n{line.strip()}  # since May\n")
    assert [key.client for key in read_keys(file)] == ["alice"]
    file.write_text(line + line.replace("alice", "bob"))
    with pytest.raises(ConfigError, match=r":2: duplicate key of 'alice'"):
        read_keys(file)


OLD_LINE = "alice sha256:" + "0a" * 32


def test_a_file_of_an_older_version_works_and_is_upgraded_in_place(file: Path) -> None:
    file.parent.mkdir()
    file.write_text(f"{OLD_LINE}\n")
    [old] = read_keys(file)
    assert (old.client, old.id, old.expires, old.models, old.limit) == ("alice", "0a0a0a0a", None, None, None)
    add_key(file, "bob", models=["phi-4"])
    assert file.read_text().splitlines()[0] == OLD_LINE
    assert [key.client for key in read_keys(file)] == ["alice", "bob"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ('{"expires": "2026-01-01T00:00:00"}', "expires"),
        ('{"expires": "soon"}', "expires"),
        ('{"models": ["a b"]}', "models.0"),
        ('{"limit": "60/mni"}', "limit: .*60/mni"),
        ('{"limits": "60/min"}', "limits"),
        ("{", "must be NAME"),
        ('{"models": [}', "JSON"),
    ],
)
def test_invalid_options_of_a_line_are_named(file: Path, options: str, message: str) -> None:
    file.parent.mkdir()
    file.write_text(f"{OLD_LINE} {options}\n")
    with pytest.raises(ConfigError, match=rf"api_keys:1: .*{message}"):
        read_keys(file)


def test_an_expired_key_is_found_but_expired_and_makes_room_for_another(file: Path) -> None:
    now = datetime.now(timezone.utc)
    old = add_key(file, "alice", expires=now - timedelta(seconds=1))
    keys = ApiKeys(file)
    found = keys.find(old)
    assert found is not None
    assert found.is_expired()
    new = add_key(file, "alice", expires=now + timedelta(days=1))
    keys.reload()
    assert keys.find(old) is None
    found = keys.find(new)
    assert found is not None
    assert not found.is_expired()


def test_a_key_is_replaced_without_an_outage(file: Path) -> None:
    limit = TrafficTarget.parse("60/min")
    old = add_key(file, "alice", models=["phi-4"], limit=limit)
    new = add_key(file, "alice", rotate=True)
    keys = ApiKeys(file)
    assert (client(keys, old), client(keys, new), keys.count) == ("alice", "alice", 1)
    first, second = read_keys(file)
    assert (second.models, second.limit) == (first.models, first.limit) == (("phi-4",), limit)
    with pytest.raises(InputError, match=f"2 valid keys.*--id {first.id}"):
        add_key(file, "alice", rotate=True)
    assert remove_keys(file, "alice", first.id) == 1
    keys.reload()
    assert (client(keys, old), client(keys, new)) == (None, "alice")
    with pytest.raises(InputError, match="no key 'ffffffff'"):
        remove_keys(file, "alice", "ffffffff")


def test_the_limit_of_a_client_is_that_of_its_newest_valid_key(file: Path) -> None:
    add_key(file, "alice", limit=TrafficTarget.parse("60/min"))
    add_key(file, "alice", limit=TrafficTarget.parse("10/min"), rotate=True)
    add_key(file, "bob")
    past = datetime.now(timezone.utc) - timedelta(days=1)
    add_key(file, "carol", limit=TrafficTarget.parse("1/min"), expires=past)
    assert {name: str(limit) for name, limit in ApiKeys(file).limits().items()} == {"alice": "10/min"}


def test_the_last_use_is_stored_beside_the_keys_for_all_servers(file: Path) -> None:
    alice, bob = add_key(file, "alice"), add_key(file, "bob")
    one, other = ApiKeys(file), ApiKeys(file)
    before = datetime.now(timezone.utc)
    one.find(alice)
    one.store_last_used()
    other.find(bob)
    other.store_last_used()
    used = read_last_used(file)
    assert set(used) == {key.id for key in read_keys(file)}
    assert all(at >= before for at in used.values())
    written = file.with_name("api_keys.used").stat().st_mtime_ns
    one.store_last_used()
    assert file.with_name("api_keys.used").stat().st_mtime_ns == written, "nothing new, nothing written"
    remove_keys(file, "bob")
    one.find(alice)
    one.store_last_used()
    assert len(read_last_used(file)) == 1


def test_a_last_use_that_cannot_be_stored_stops_nothing(file: Path) -> None:
    key = add_key(file, "alice")
    keys = ApiKeys(file)
    file.with_name("api_keys.used").mkdir()
    assert client(keys, key) == "alice"
    with pytest.raises(ConfigError, match="cannot be stored"):
        keys.store_last_used()
    assert read_last_used(file) == {}
    assert client(keys, key) == "alice"


def test_a_key_from_the_environment() -> None:
    keys = ApiKeys(None, "x" * 20)
    assert (client(keys, "x" * 20), keys.count) == ("ROUTER_API_KEY", 1)
    for bad in ("short", "x" * 19, "x" * 20 + " y", "ü" * 20):
        with pytest.raises(ConfigError, match="ROUTER_API_KEY") as caught:
            ApiKeys(None, bad)
        assert bad not in str(caught.value)
