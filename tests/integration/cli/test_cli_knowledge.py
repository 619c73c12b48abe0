"""`router knowledge`: add, remove, list, search, evaluate."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.command_line import CommandLine


@pytest.fixture
def router(database: str, tmp_path: Path) -> CommandLine:
    return CommandLine({"ROUTER_DATABASE_URL": database, "ROUTER_DATA": str(tmp_path / "data")})


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    folder = tmp_path / "notes"
    (folder / "deep").mkdir(parents=True)
    (folder / "owls.md").write_text("# Owls\nAn owl hunts at night.\n")
    (folder / "deep" / "bats.txt").write_text("A bat hears where it flies.\n")
    return folder


def test_a_folder_is_added_and_found_at_once(router: CommandLine, notes: Path):
    said = router("knowledge", "add", notes)
    assert said.code == 0, said.err
    assert f"added: {notes}/owls.md (1 entries)" in said.out
    found = router("knowledge", "search", "Which bird hunts at night?", "--json").json
    assert found["knows"]
    assert found["passages"][0]["source"] == "notes/owls.md: Owls"
    assert found["passages"][0]["text"] == "Owls\nAn owl hunts at night."
    said = router("knowledge", "search", "a bat hears")
    assert "[1] notes/deep/bats.txt" in said.out
    assert "knows: confidence" in said.out


def test_adding_again_changes_nothing_or_replaces(router: CommandLine, notes: Path):
    router("knowledge", "add", notes)
    again = router("knowledge", "add", notes, "--json").json
    assert set(again["files"].values()) == {"unchanged"}
    (notes / "owls.md").write_text("# Owls\nAn owl is quiet.\n")
    assert router("knowledge", "add", notes / "owls.md", "--json").json["files"] == {
        str(notes / "owls.md"): "replaced"
    }
    listed = router("knowledge", "list", "--json").json
    assert [(source["source"], source["entries"]) for source in listed] == [
        (str(notes / "deep" / "bats.txt"), 1),
        (str(notes / "owls.md"), 1),
    ]


def test_a_file_that_is_not_text_is_named_and_the_others_are_added(router: CommandLine, notes: Path):
    (notes / "photo.jpg").write_bytes(b"\xff\xd8\xff")
    (notes / "old.md").write_bytes(b"M\xfcnchen")
    (notes / "bad.jsonl").write_text('{"text": "fine"}\n{"text": 7}\n')
    said = router("knowledge", "add", notes)
    assert said.code == 3
    assert f"{notes}/photo.jpg is none of .md, .txt, .rst, .jsonl. It was left out." in said.err
    assert f"{notes}/old.md is not UTF-8 text: line 1 holds the byte 0xfc." in said.err
    assert f'{notes}/bad.jsonl line 2 is no object with a "text".' in said.err
    assert "owls.md" in said.out


def test_what_does_not_exist_is_an_error(router: CommandLine, tmp_path: Path):
    said = router("knowledge", "add", tmp_path / "nothing.md")
    assert said.code == 1
    assert "nothing.md does not exist" in said.err


def test_removed_is_forgotten(router: CommandLine, notes: Path):
    router("knowledge", "add", notes)
    (notes / "owls.md").unlink()
    assert router("knowledge", "remove", notes / "owls.md").out == f"removed: {notes}/owls.md\n"
    assert router("knowledge", "search", "owl hunts", "--json").json["knows"] is False
    assert router("knowledge", "remove", notes, "--json").json["removed"] == [
        str(notes / "deep" / "bats.txt")
    ]
    said = router("knowledge", "remove", notes)
    assert said.code == 3
    assert "was never added" in said.err
    assert "No file was added yet" in router("knowledge", "list").out


def test_a_folder_does_not_stand_for_its_namesakes(router: CommandLine, tmp_path: Path):
    for name in ("a_b", "a_b-c", "aXb"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "n.md").write_text(f"text of {name}")
        router("knowledge", "add", tmp_path / name)
    assert router("knowledge", "remove", tmp_path / "a_b", "--json").json["removed"] == [
        str(tmp_path / "a_b" / "n.md")
    ]


def test_searching_needs_no_database(tmp_path: Path):
    router = CommandLine({"ROUTER_DATA": str(tmp_path)})
    said = router("knowledge", "search", "How do I pause a model?")
    assert said.code == 0, said.err
    assert "traffic.md" in said.out
    said = router("knowledge", "search", "Who won the cup in 1998?")
    assert "no knowledge" in said.out


def test_a_database_that_is_away_is_said_and_the_files_answer(tmp_path: Path):
    router = CommandLine(
        {"ROUTER_DATA": str(tmp_path), "ROUTER_DATABASE_URL": "postgresql://nobody@127.0.0.1:9/none"}
    )
    said = router("knowledge", "search", "How do I pause a model?")
    assert said.code == 0
    assert "Only what this host has already is searched" in said.err
    assert "traffic.md" in said.out


@pytest.fixture
def collection(tmp_path: Path) -> Path:
    folder = tmp_path / "collection"
    folder.mkdir()
    documents = [
        {"_id": f"d{n}", "title": "T", "text": text} for n, text in enumerate(["cats purr", "dogs bark"])
    ]
    (folder / "corpus.jsonl").write_text("\n".join(map(json.dumps, documents)))
    (folder / "queries.jsonl").write_text(
        '{"_id": "q1", "text": "barking"}\n{"_id": "q2", "text": "unjudged"}\n'
    )
    (folder / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td1\t1\nq1\td0\t0\n")
    return folder


def test_evaluate_counts(router: CommandLine, collection: Path):
    said = router("knowledge", "evaluate", collection, "--json").json
    assert (said["documents"], said["queries"]) == (2, 1)
    assert (said["hit_at_1"], said["hit_at_5"], said["mrr"]) == (1, 1, 1)
    assert said["build_seconds"] > 0
    assert "hit@1 1.000" in router("knowledge", "evaluate", collection).out


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("corpus.jsonl", None, "corpus.jsonl does not exist"),
        ("corpus.jsonl", "{", "corpus.jsonl, line 1 is not JSON"),
        ("queries.jsonl", '{"_id": 1}', 'queries.jsonl, line 1 must be an object with "_id"'),
        ("qrels.tsv", "q1 d0 1", "names no relevant document"),
        ("qrels.tsv", "a\tb\tc\nq1\td0\n", "qrels.tsv, line 2 must hold"),
        ("qrels.tsv", "q1\td9\t1\n", "document 'd9' is not in corpus.jsonl"),
    ],
)
def test_evaluate_names_what_is_wrong(
    router: CommandLine, collection: Path, name: str, content: str | None, why: str
):
    if content is None:
        (collection / name).unlink()
    else:
        (collection / name).write_text(content)
    said = router("knowledge", "evaluate", collection)
    assert said.code == 1
    assert why in said.err
