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


def test_added_folder_is_found_at_once(router: CommandLine, notes: Path):
    result = router("knowledge", "add", notes)
    assert result.code == 0, result.err
    assert f"added: {notes}/owls.md (1 entries)" in result.out
    found = router("knowledge", "search", "Which bird hunts at night?", "--json").json
    assert found["knows"]
    assert found["passages"][0]["source"] == "notes/owls.md: Owls"
    assert found["passages"][0]["text"] == "Owls\nAn owl hunts at night."
    result = router("knowledge", "search", "a bat hears")
    assert "[1] notes/deep/bats.txt" in result.out
    assert "relevant: confidence" in result.out


def test_adding_again_replaces_changed_files(router: CommandLine, notes: Path):
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


def test_adding_a_folder_again_removes_files_that_are_gone(router: CommandLine, notes: Path):
    router("knowledge", "add", notes)
    beside = notes.parent / "notes-of-others"
    beside.mkdir()
    (beside / "a.md").write_text("An ant.")
    router("knowledge", "add", beside)
    (notes / "owls.md").unlink()
    result = router("knowledge", "add", notes)
    assert f"removed: {notes}/owls.md: the file is gone" in result.out
    kept = {str(notes / "deep" / "bats.txt"), str(beside / "a.md")}
    assert {source["source"] for source in router("knowledge", "list", "--json").json} == kept
    (notes / "deep" / "bats.txt").unlink()
    assert router("knowledge", "add", notes).code == 3  # an empty folder may be one that cannot be read
    assert {source["source"] for source in router("knowledge", "list", "--json").json} == kept


def test_symbolic_link_out_of_the_folder_is_not_added(router: CommandLine, notes: Path):
    (notes.parent / "secret.md").write_text("The password of the owl.")
    (notes / "link.md").symlink_to(notes.parent / "secret.md")
    result = router("knowledge", "add", notes)
    assert result.code == 3
    assert "link.md is a symbolic link out of the folder" in result.err
    assert len(router("knowledge", "list", "--json").json) == 2


def test_file_that_is_not_text_is_reported_and_others_are_added(router: CommandLine, notes: Path):
    (notes / "photo.jpg").write_bytes(b"\xff\xd8\xff")
    (notes / "old.md").write_bytes(b"M\xfcnchen")
    (notes / "bad.jsonl").write_text('{"text": "fine"}\n{"text": 7}\n')
    result = router("knowledge", "add", notes)
    assert result.code == 3
    assert f"{notes}/photo.jpg has none of the suffixes .md, .txt, .rst, .jsonl. Skipped." in result.err
    assert f"{notes}/old.md is not UTF-8 text: line 1 contains the byte 0xfc." in result.err
    assert f'{notes}/bad.jsonl line 2 is not an object with a "text".' in result.err
    assert "owls.md" in result.out


def test_missing_file_is_an_error(router: CommandLine, tmp_path: Path):
    result = router("knowledge", "add", tmp_path / "nothing.md")
    assert result.code == 1
    assert "nothing.md does not exist" in result.err


def test_removed_file_is_not_found(router: CommandLine, notes: Path):
    router("knowledge", "add", notes)
    (notes / "owls.md").unlink()
    assert router("knowledge", "remove", notes / "owls.md").out == f"removed: {notes}/owls.md\n"
    assert router("knowledge", "search", "owl hunts", "--json").json["knows"] is False
    assert router("knowledge", "remove", notes, "--json").json["removed"] == [
        str(notes / "deep" / "bats.txt")
    ]
    result = router("knowledge", "remove", notes)
    assert result.code == 3
    assert "is not an added file" in result.err
    assert "No files added" in router("knowledge", "list").out


def test_removing_a_folder_keeps_folders_with_similar_names(router: CommandLine, tmp_path: Path):
    for name in ("a_b", "a_b-c", "aXb"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "n.md").write_text(f"text of {name}")
        router("knowledge", "add", tmp_path / name)
    assert router("knowledge", "remove", tmp_path / "a_b", "--json").json["removed"] == [
        str(tmp_path / "a_b" / "n.md")
    ]


def test_search_works_without_a_database(tmp_path: Path):
    router = CommandLine({"ROUTER_DATA": str(tmp_path)})
    result = router("knowledge", "search", "How do I pause a model?")
    assert result.code == 0, result.err
    assert "traffic.md" in result.out
    result = router("knowledge", "search", "Who won the cup in 1998?")
    assert "not relevant" in result.out


def test_unreachable_database_is_reported_and_files_are_searched(tmp_path: Path):
    router = CommandLine(
        {"ROUTER_DATA": str(tmp_path), "ROUTER_DATABASE_URL": "postgresql://nobody@127.0.0.1:9/none"}
    )
    result = router("knowledge", "search", "How do I pause a model?")
    assert result.code == 0
    assert "which could not be updated" in result.err
    assert "traffic.md" in result.out


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


def test_evaluate_reports_quality(router: CommandLine, collection: Path):
    result = router("knowledge", "evaluate", collection, "--json").json
    assert (result["documents"], result["queries"]) == (2, 1)
    assert (result["hit_at_1"], result["hit_at_5"], result["mrr"]) == (1, 1, 1)
    assert result["build_seconds"] > 0
    assert "hit@1 1.000" in router("knowledge", "evaluate", collection).out


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("corpus.jsonl", None, "corpus.jsonl does not exist"),
        ("corpus.jsonl", "{", "corpus.jsonl, line 1: not valid JSON"),
        ("queries.jsonl", '{"_id": 1}', 'queries.jsonl, line 1: must have an "_id"'),
        ("qrels.tsv", "q1 d0 1", "names no relevant document"),
        ("qrels.tsv", "a\tb\tc\nq1\td0\n", "qrels.tsv, line 2: must be"),
        ("qrels.tsv", "q1\td9\t1\n", "document 'd9' is not in corpus.jsonl"),
    ],
)
def test_evaluate_reports_invalid_files(
    router: CommandLine, collection: Path, name: str, content: str | None, why: str
):
    if content is None:
        (collection / name).unlink()
    else:
        (collection / name).write_text(content)
    result = router("knowledge", "evaluate", collection)
    assert result.code == 1
    assert why in result.err
