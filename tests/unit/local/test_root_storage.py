"""As root, PostgreSQL runs below closed folders without any change of their modes."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from local import postgres, root_storage
from local.postgres import start_postgres
from router.database import connect

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root needs another user for PostgreSQL")


@pytest.fixture
def closed() -> Iterator[Path]:
    """A folder that only root may enter, below a path with a blank and letters beyond ASCII."""
    folder = Path(tempfile.mkdtemp(prefix="router test ä ", dir="/var/tmp"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def storage(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="router-test-storage-", dir="/var/tmp"))
    folder.chmod(0o755)
    monkeypatch.setattr(root_storage, "STORAGE", folder)
    yield folder
    shutil.rmtree(folder)


def modes(folder: Path) -> dict[Path, int]:
    return {path: stat.S_IMODE(path.stat().st_mode) for path in (folder, *folder.parents)}


def entries(storage: Path) -> set[str]:
    return {path.parent.name for path in storage.glob("*/origin.json")}


def test_data_and_programs_below_a_closed_folder(
    closed: Path, storage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packages = closed / "venv"
    for name in root_storage.NEEDED:
        shutil.copytree(postgres._packages() / name, packages / name)
    monkeypatch.setattr(postgres, "_packages", lambda: packages)
    before = modes(packages / root_storage.NEEDED[0])
    data = closed / "data" / "postgres"
    for rows in (0, 1):  # the second start finds the data of the first
        server = start_postgres(data, settings={"fsync": "off"})
        try:
            with connect(server.url("postgres")) as connection, connection.cursor() as cursor:
                cursor.execute("CREATE TABLE IF NOT EXISTS kept (id integer)")
                cursor.execute("SELECT count(*) FROM kept")
                assert cursor.fetchone() == (rows,)
                cursor.execute("INSERT INTO kept VALUES (1)")
        finally:
            server.stop()
    assert modes(packages / root_storage.NEEDED[0]) == before
    assert data.is_symlink()
    assert len(entries(storage)) == 2


def test_storage_is_removed_once_its_origin_is_gone(closed: Path, storage: Path) -> None:
    identity = (12345, 12345)
    first = root_storage.reachable_data(closed / "first", identity)
    second = closed / "second"
    second.mkdir()
    (second / "PG_VERSION").write_text("18")
    moved = root_storage.reachable_data(second, identity)
    assert (moved / "PG_VERSION").stat().st_uid == identity[0]
    assert root_storage.reachable_data(second, identity) == moved
    (closed / "first").unlink()
    root_storage.reachable_data(closed / "third", identity)
    assert not first.exists()
    assert (moved / "PG_VERSION").read_text() == "18"
    shutil.rmtree(moved.parent)
    assert root_storage.reachable_data(second, identity).exists()  # the link led nowhere


def test_an_open_folder_is_used_itself(storage: Path) -> None:
    folder = storage / "open"
    assert root_storage.reachable_data(folder, (12345, 12345)) == folder
    assert entries(storage) == set()
