"""Knowledge as callers use it: from files alone, and from Postgres, updated by child processes."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import psutil
import pytest

from router.database import connect
from router.knowledge.files import KnowledgeFile, read_file
from router.knowledge.index import KnowledgeIndex
from router.knowledge.indexer import Indexer, IndexReport, update_index
from router.knowledge.knowledge import Knowledge
from router.knowledge.results import NO_PASSAGES, Passage, SearchResult
from router.knowledge.sources import add_file, remove_path
from router.knowledge.storage import IndexFolder
from router.settings.environment import DEFAULT_CONFIG_FOLDER
from tests.support.queue import Probe
from tests.support.waiting import until as until_true

SHIPPED = DEFAULT_CONFIG_FOLDER / "knowledge"


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    folder = tmp_path / "notes"
    folder.mkdir()
    (folder / "cats.md").write_text("# Cats\nA cat purrs when it is content.\n")
    (folder / "dogs.md").write_text("# Dogs\nA dog wags its tail.\n")
    return folder


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "index"


async def first(knowledge: Knowledge, question: str) -> str:
    found = await knowledge.search(question)
    return found.passages[0].source if found.passages else ""


async def until(condition: Callable[[], Awaitable[object]], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not await condition():
        assert time.monotonic() < deadline, f"condition not met within {seconds:g} s"
        await asyncio.sleep(0.05)


async def solve(probe: Probe, prompt: str, answer: str) -> int:
    task_id = await probe.add(prompt)
    await probe.run("SELECT heartbeat('w1')")
    assert await probe.settle(await probe.must_claim("general"), answer=answer) == "solved"
    return task_id


def knowledge_file(path: Path) -> KnowledgeFile:
    file = read_file(path, key="k", name=path.name)
    assert isinstance(file, KnowledgeFile)
    return file


def indexed(home: Path, question: str) -> list[str]:
    return [passage.source for passage in IndexFolder(home).read_index().search(question, 5).passages]


async def test_files_are_searched_without_a_database(notes: Path):
    async with Knowledge.open(notes) as knowledge:
        found = await knowledge.search("When does a cat purr?")
    assert found.is_relevant
    assert found.passages[0].source == "cats.md: Cats"
    assert "A cat purrs when it is content." in found.as_answer()
    assert "(from cats.md: Cats)" in found.as_answer()


async def test_unknown_question_has_no_relevant_passages(notes: Path):
    async with Knowledge.open(notes) as knowledge:
        for question in (
            "Who won the cup in 1998?",
            "",
            "\x00",
            "tail of the comet that Halley saw long ago",
        ):
            assert (await knowledge.search(question)).as_answer() == NO_PASSAGES


@pytest.mark.parametrize(("confidence", "is_relevant"), [(0.24, False), (0.26, True)])
def test_low_confidence_passage_is_not_relevant(confidence: float, is_relevant: bool):
    found = SearchResult((Passage("It may be so.", "a.md", 1.0),), confidence)
    assert found.is_relevant is is_relevant
    assert ("It may be so." in found.as_answer()) is is_relevant


def test_answer_contains_only_passages_with_high_scores():
    passages = tuple(Passage(f"text {place}", "a.md", score) for place, score in enumerate((9.0, 8.0, 3.0)))
    answer = SearchResult(passages, 0.9).as_answer()
    assert "text 0" in answer
    assert "text 1" in answer
    assert "text 2" not in answer


async def test_missing_folder_and_invalid_files_are_tolerated(
    notes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    (notes / "image.png").write_bytes(b"\x89PNG\x00")
    (notes / "latin.md").write_bytes(b"M\xfcnchen")
    (notes / ".hidden.md").write_text("cat cat cat")
    async with Knowledge.open(notes) as knowledge:
        assert await first(knowledge, "cat") == "cats.md: Cats"
        assert knowledge.entries == 2
    assert "image.png has none of the suffixes .md" in caplog.text
    assert "latin.md is not UTF-8 text: line 1 contains the byte 0xfc" in caplog.text
    async with Knowledge.open(tmp_path / "nowhere") as knowledge:
        assert (await knowledge.search("cat")).as_answer() == NO_PASSAGES


async def test_changed_file_is_found_without_restart(notes: Path):
    async with Knowledge.open(notes, update_seconds=0.05) as knowledge:
        assert await first(knowledge, "zebra stripes") == ""
        (notes / "zebras.md").write_text("# Zebras\nA zebra has stripes.\n")
        await until(lambda: first(knowledge, "zebra stripes"))


async def test_shipped_files_answer_questions_of_operators():
    async with Knowledge.open(SHIPPED) as knowledge:
        for question, part in {
            "How do I stop one model?": "traffic target to `0`",
            "how can I retry failed tasks": "router retry",
            "What does a 429 from the provider do?": "Retry-After",
            "difference between mean and median": "in the middle",
        }.items():
            assert part in (await knowledge.search(question)).as_answer(), question


@pytest.mark.parametrize(
    "prompt",
    [
        "what is 2+2?", "thanks", "fix it", "it does not work", "help", "hello there", "what time is it",
        "run it", "are you sure", "say something", "another one", "do it again", "error", "stop", "explain",
        "tell me more", "shorter please", "thanks thanks thanks thanks thanks", "model", "invoice",
    ],
)  # fmt: skip
async def test_one_or_two_common_words_are_not_enough_evidence(prompt: str):
    async with Knowledge.open(SHIPPED) as knowledge:
        assert not (await knowledge.search(prompt)).is_relevant


async def test_symbolic_link_out_of_the_folder_is_not_followed(
    notes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    (tmp_path / "secret.md").write_text("# Zebras\nA zebra has stripes.\n")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "more.md").write_text("# Zebras\nA zebra has stripes.\n")
    (notes / "link.md").symlink_to(tmp_path / "secret.md")
    (notes / "folder").symlink_to(tmp_path / "elsewhere")
    (notes / "loop.md").symlink_to(notes / "loop.md")
    (notes / "inside.md").symlink_to(notes / "cats.md")
    async with Knowledge.open(notes) as knowledge:
        assert await first(knowledge, "zebra stripes") == ""
    assert f"link.md is a symbolic link out of the folder, to {tmp_path}/secret.md" in caplog.text


async def test_search_does_not_block_the_event_loop(notes: Path):
    seen: set[int] = set()
    index_search = KnowledgeIndex.search

    def recording(self: KnowledgeIndex, question: str, limit: int) -> SearchResult:
        seen.add(threading.get_ident())
        return index_search(self, question, limit)

    async with Knowledge.open(notes) as knowledge:
        knowledge._file_index.search = recording.__get__(knowledge._file_index)  # type: ignore[method-assign]
        await asyncio.gather(*(knowledge.search("cat") for _ in range(20)))
    assert seen
    assert threading.get_ident() not in seen


async def test_without_postgres_files_are_searched_and_the_error_is_logged(
    notes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    url = "postgresql://nobody:sec" + "ret@127.0.0.1:9/none"
    async with Knowledge.open(notes, database_url=url, data_folder=tmp_path, update_seconds=0.1) as knowledge:
        assert await first(knowledge, "cat") == "cats.md: Cats"

        async def logged() -> bool:
            return "cannot be reached" in caplog.text

        await until(logged)
        assert await first(knowledge, "cat") == "cats.md: Cats"
    assert "secret" not in caplog.text


async def test_without_writable_folder_files_are_searched(
    notes: Path, tmp_path: Path, database: str, caplog: pytest.LogCaptureFixture
):
    blocked = tmp_path / "blocked"
    blocked.write_text("a file, no folder")
    async with Knowledge.open(
        notes, database_url=database, data_folder=blocked, update_seconds=0.1
    ) as knowledge:

        async def logged() -> bool:
            return "knowledge index not updated" in caplog.text

        await until(logged)
        assert await first(knowledge, "cat") == "cats.md: Cats"


async def test_added_file_is_found_on_every_host(
    notes: Path, tmp_path: Path, database: str, probe: Probe, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO, "router.knowledge")
    await solve(probe, "Why is the sky blue?", "Air scatters blue light more.")
    hosts = [
        Knowledge.open(notes, database_url=database, data_folder=tmp_path / name, update_seconds=0.2)
        for name in ("one", "two")
    ]
    async with hosts[0] as one, hosts[1] as two:
        for knowledge in (one, two):
            await until(lambda knowledge=knowledge: first(knowledge, "blue sky"))
            assert (await knowledge.search("blue sky")).passages[0].text == (
                "Question: Why is the sky blue?\nAnswer: Air scatters blue light more."
            )
            assert await first(knowledge, "cat purring") == "cats.md: Cats"
        path = tmp_path / "owls.md"
        path.write_text("# Owls\nAn owl hunts at night.\n")
        with connect(database) as connection:
            add_file(connection, path, knowledge_file(path))
        for knowledge in (one, two):
            await until(lambda knowledge=knowledge: first(knowledge, "hunting at night"))
    assert "knowledge index: 3 added" in caplog.text


async def test_closing_during_a_run_leaves_no_process_or_task(
    notes: Path, tmp_path: Path, database: str, probe: Probe
):
    await probe.run(
        "INSERT INTO tasks (prompt, answer, status, solved_at)"
        " SELECT 'q ' || n, repeat('word' || n || ' ', 300), 'solved', now() FROM generate_series(1, 3000) n"
    )
    children: list[psutil.Process] = []

    async def working() -> bool:
        found = [
            child
            for child in psutil.Process().children()
            if "router.knowledge.indexer" in " ".join(child.cmdline())
        ]
        children.extend(found)
        return bool(found)

    async with Knowledge.open(notes, database_url=database, data_folder=tmp_path, update_seconds=60):
        await until(working)
    assert not any(child.is_running() for child in children)
    assert not [task for task in asyncio.all_tasks() if task.get_name().startswith("knowledge")]


async def test_only_answers_of_chosen_models_are_indexed(
    notes: Path, home: Path, database: str, probe: Probe
):
    well = await solve(probe, "What eats a marmot?", "An eagle does.")
    await probe.add("What is a marmot?")
    provisional = await probe.add("Where does a marmot sleep?")
    call = await probe.fallback_call(provisional, 2)
    assert await probe.settle(call, answer="In a marmot burrow.") == "kept"
    old = await probe.add(
        "How old is a marmot?", status="solved", answer="15 years."
    )  # solved before ranks were stored
    failed = await probe.add("Why, marmot?", status="failed", answer="A marmot.")
    update_index(home, notes, database)
    assert set(indexed(home, "marmot")) == {f"task {well}", f"task {old}"}
    assert f"task {failed}" not in indexed(home, "marmot")
    assert update_index(home, notes, database, tasks=False).entries == 4


async def test_run_continues_where_the_last_one_ended(notes: Path, home: Path, database: str, probe: Probe):
    assert (await _update(home, notes, database)).added == 2
    assert (await _update(home, notes, database)).added == 0
    task_id = await solve(probe, "What eats a marmot?", "An eagle does.")
    assert (await _update(home, notes, database)).entries == 3
    assert indexed(home, "marmot") == [f"task {task_id}"]


async def _update(home: Path, notes: Path, database: str, **options: int) -> IndexReport:
    return await asyncio.to_thread(update_index, home, notes, database, **options)


async def test_deleted_and_reset_tasks_are_removed_from_the_index(
    notes: Path, home: Path, database: str, probe: Probe
):
    gone = await solve(probe, "What eats a marmot?", "An eagle does.")
    back = await solve(probe, "What does a marmot eat?", "Grass.")
    await _update(home, notes, database)
    assert len(indexed(home, "marmot")) == 2
    await probe.run("DELETE FROM tasks WHERE id = $1", gone)
    await probe.run("UPDATE tasks SET status = 'unsolved' WHERE id = $1", back)
    await _update(home, notes, database)
    assert indexed(home, "marmot") == []


async def test_task_solved_again_has_its_new_answer(notes: Path, home: Path, database: str, probe: Probe):
    task_id = await solve(probe, "What eats a marmot?", "An eagle does.")
    await _update(home, notes, database)
    await probe.run("UPDATE tasks SET status = 'unsolved' WHERE id = $1", task_id)
    assert await probe.settle(await probe.must_claim("general"), answer="A wolf does.") == "solved"
    await _update(home, notes, database)
    passages = IndexFolder(home).read_index().search("marmot", 5).passages
    assert [passage.text for passage in passages] == ["Question: What eats a marmot?\nAnswer: A wolf does."]


async def test_slices_neither_miss_nor_duplicate_a_task(notes: Path, home: Path, database: str, probe: Probe):
    await probe.run(
        "INSERT INTO tasks (prompt, answer, status, solved_at) SELECT 'question ' || n, 'answer ' || n,"
        " CASE WHEN n % 3 = 0 THEN 'failed' ELSE 'solved' END, now() FROM generate_series(1, 100) n"
    )
    await probe.run("DELETE FROM tasks WHERE id % 7 = 0")
    expected = {row["id"] for row in await probe.all("SELECT id FROM tasks WHERE status = 'solved'")}
    home_folder = IndexFolder(home)
    for _ in range(3):
        with home_folder.exclusive(), connect(database, autocommit=True) as connection:
            Indexer(home_folder, connection, slice_tasks=7).run(notes)
        index = home_folder.read_index()
        assert index.task_owners(-(2**62), 2**62).keys() == expected
        assert len(index) == len(expected) + 2


async def test_a_task_moves_to_another_client_with_the_full_scan(
    notes: Path, home: Path, database: str, probe: Probe
):
    await probe.run(
        "INSERT INTO tasks (prompt, answer, status, solved_at, client)"
        " VALUES ('What eats a marmot?', 'A wolf does.', 'solved', now() - interval '1 hour', 'alice')"
    )

    async def found(client: str) -> bool:
        await _update(home, notes, database)
        passages = IndexFolder(home).read_index().search("marmot", 5, client).passages
        return any("wolf" in passage.text for passage in passages)

    assert [await found(client) for client in ("alice", "bob", "")] == [True, False, False]
    await probe.run("UPDATE tasks SET client = 'bob'")
    assert [await found(client) for client in ("alice", "bob", "")] == [False, True, False]


async def test_full_index_keeps_the_newest_tasks(notes: Path, home: Path, database: str, probe: Probe):
    insert = (
        "INSERT INTO tasks (prompt, answer, status, solved_at)"
        " SELECT 'question', 'answer', 'solved', now() - interval '1 hour' FROM generate_series(1, $1)"
    )
    await probe.run(insert, 30)
    newest = await probe.value("SELECT max(id) FROM tasks")
    assert (await _update(home, notes, database, max_entries=12)).entries == 12
    await probe.run(insert, 5)
    assert (await _update(home, notes, database, max_entries=12)).entries == 12
    assert IndexFolder(home).read_index().task_owners(0, 2**62).keys() == set(range(newest - 4, newest + 6))
    assert (await _update(home, notes, database, max_entries=12)).added == 0, (
        "excess tasks are not scanned again"
    )


async def test_sources_are_replaced_and_removed(notes: Path, home: Path, tmp_path: Path, database: str):
    path = tmp_path / "owls.md"

    def add(text: str) -> str:
        path.write_text(text)
        with connect(database) as connection:
            return add_file(connection, path, knowledge_file(path))

    assert add("# Owls\nAn owl hunts at night.\n\n# Food\nMice.\n") == "added"
    assert add("# Owls\nAn owl hunts at night.\n\n# Food\nMice.\n") == "unchanged"
    await _update(home, notes, database)
    assert indexed(home, "mice") == ["owls.md: Food"]
    assert add("# Owls\nAn owl is quiet.\n") == "replaced"
    await _update(home, notes, database)
    assert indexed(home, "mice night") == []
    assert indexed(home, "quiet owl") == ["owls.md: Owls"]
    with connect(database) as connection:
        assert remove_path(connection, tmp_path) == [str(path)]
        assert remove_path(connection, path) == []
    await _update(home, notes, database)
    assert indexed(home, "quiet owl") == []
    assert add("# Owls\nAn owl is quiet.\n") == "added"


async def test_index_of_another_database_is_rebuilt(
    notes: Path, home: Path, database: str, empty_database: str, probe: Probe
):
    from router.migrations import migrate  # noqa: PLC0415 - only here

    await solve(probe, "What eats a marmot?", "An eagle does.")
    await _update(home, notes, database)
    migrate(empty_database)
    await _update(home, notes, empty_database)
    assert indexed(home, "marmot") == []
    assert indexed(home, "cat purrs") == ["cats.md: Cats"]


@pytest.mark.parametrize("broken", ["index/meta.json", "state.json"])
async def test_broken_index_is_rebuilt(broken: str, notes: Path, home: Path, database: str, probe: Probe):
    await solve(probe, "What eats a marmot?", "An eagle does.")
    await _update(home, notes, database)
    (home / broken).write_text("{")
    assert (await _update(home, notes, database)).entries == 3
    assert len(indexed(home, "marmot eagle")) == 1


@pytest.mark.parametrize("left", [(), ("meta.json",)])
async def test_state_without_its_index_is_ignored(
    left: tuple[str, ...], notes: Path, home: Path, database: str, probe: Probe
):
    await solve(probe, "What eats a marmot?", "An eagle does.")
    await _update(home, notes, database)
    shutil.rmtree(home / "index")
    if left:
        KnowledgeIndex(home / "index")  # a reader created an empty one
    assert (await _update(home, notes, database)).entries == 3


async def test_killed_run_is_completed_by_the_next(notes: Path, home: Path, database: str, probe: Probe):
    await probe.run(
        "INSERT INTO tasks (prompt, answer, status, solved_at)"
        " SELECT 'q ' || n, repeat('word' || n || ' ', 99), 'solved', now() - interval '1 hour'"
        "   FROM generate_series(1, 4000) n"
    )
    expected = {row["id"] for row in await probe.all("SELECT id FROM tasks")}
    for after_seconds in (0.0, 0.1, 0.3):
        child = subprocess.Popen(
            [sys.executable, "-m", "router.knowledge.indexer", str(home), str(notes)],
            env={**os.environ, "ROUTER_DATABASE_URL": database},
        )
        until_true((home / "index" / "meta.json").exists)
        await asyncio.sleep(after_seconds)  # killed at an arbitrary point
        child.kill()
        child.wait()
    assert (await _update(home, notes, database)).entries == len(expected) + 2
    assert IndexFolder(home).read_index().task_owners(-(2**62), 2**62).keys() == expected


async def test_index_unused_for_weeks_is_deleted(notes: Path, tmp_path: Path, database: str):
    for name in ("mine", "recent", "unused"):
        await _update(tmp_path / "indexes" / name, notes, database)
    long_ago = time.time() - 15 * 86_400
    for name in ("mine", "unused"):
        os.utime(tmp_path / "indexes" / name / "state.json", (long_ago, long_ago))
    strange = tmp_path / "indexes" / "strange"
    strange.mkdir()
    (strange / "state.json").write_text("of another program")
    os.utime(strange / "state.json", (long_ago, long_ago))
    await _update(tmp_path / "indexes" / "mine", notes, database)
    assert {path.name for path in (tmp_path / "indexes").iterdir()} == {"mine", "recent", "strange"}


async def test_only_one_run_at_a_time(notes: Path, home: Path, database: str):
    with IndexFolder(home).exclusive() as acquired:
        assert acquired
        assert (await _update(home, notes, database)).busy


async def test_update_reports_that_another_process_is_at_work(notes: Path, database: str, tmp_path: Path):
    async with Knowledge.open(
        notes, database_url=database, data_folder=tmp_path / "data", keep_updated=False
    ) as knowledge:
        assert await knowledge.update()
        (home,) = (tmp_path / "data" / "knowledge").iterdir()
        with IndexFolder(home).exclusive():
            assert not await knowledge.update()


async def test_source_versions_become_visible_in_order(tmp_path: Path, database: str):
    """An addition waits for other open ones, so that no version appears below one already read."""
    path = tmp_path / "a.md"
    path.write_text("first")
    file = knowledge_file(path)
    done = threading.Event()

    def second() -> None:
        with connect(database) as connection:
            add_file(connection, tmp_path / "b.md", file)
        done.set()

    with connect(database) as connection:
        add_file(connection, path, file)
        other = threading.Thread(target=second)
        other.start()
        assert not done.wait(0.3)
    assert done.wait(10)
    other.join()
