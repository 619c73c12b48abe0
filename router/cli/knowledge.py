"""The commands `router knowledge ...`: manage, search and evaluate knowledge."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Optional

import typer

from router.cli import terminal
from router.database import Connection
from router.errors import InputError, RouterError
from router.knowledge import (
    Knowledge,
    KnowledgeFile,
    RejectedFile,
    SearchResult,
    add_file,
    evaluate_retrieval,
    files_in,
    read_collection,
    read_file,
    read_sources,
    remove_missing,
    remove_path,
    source_name,
)
from router.settings import data_folder, load_config
from router.task import checked_client

KNOWLEDGE_HELP = """
Manage and search passages for retrieval.

The router answers with passages when no model has answered by the deadline. Sources are the files of
config/knowledge, files added here, and solved tasks. Added files are stored in Postgres and searchable
on every host within a minute.
"""
ADD_HELP = """
Add files, or all files below folders.

Formats are Markdown, text, reStructuredText, and JSON Lines with "text" and "title". Adding a file again
replaces its entries; adding a folder again also removes files that are gone. A file that is not text, or a
symbolic link out of its folder, is reported and skipped (exit code 3).

\b
Examples:
  router knowledge add handbook.md
  router knowledge add notes/ faq.jsonl
"""
REMOVE_HELP = """
Remove added files, or all added files below a folder. They need not exist on disk.

\b
Examples:
  router knowledge remove handbook.md
  router knowledge remove notes/
"""
LIST_HELP = """
List the added files.

\b
Examples:
  router knowledge list
  router knowledge list --json | jq -r .[].source
"""
SEARCH_HELP = """
Search for passages.

Shows the best passages, and the confidence that the first one is relevant. Without a database, only
config/knowledge is searched.

\b
Examples:
  router knowledge search "How do I pause a model?"
  router knowledge search "refund after 30 days" --limit 3 --json
  router knowledge search "refund after 30 days" --client alice
"""
EVALUATE_HELP = """
Measure retrieval quality.

The folder must contain corpus.jsonl, queries.jsonl and qrels.tsv (the BEIR format). Prints hit@1 and
hit@5 (the share of questions with a relevant document first, or among the first five), the mean reciprocal
rank (MRR), and times.

\b
Examples:
  router knowledge evaluate collections/cranfield
  router knowledge evaluate collections/cranfield --json
"""
PREVIEW_LINES = 6
BUSY_NOTE = (
    "Another process of this host is updating the index: what it has indexed so far is searched."
    " Repeat the search later to see the rest."
)

knowledge = terminal.verbs()

Paths = Annotated[list[Path], typer.Argument(metavar="PATH", help="Files and folders.")]


@knowledge.command(help=ADD_HELP)
def add(paths: Paths, *, as_json: terminal.Json = False, database: terminal.Database = None) -> None:
    missing = [str(path) for path in paths if not path.exists()]
    if missing:
        raise InputError(f"{missing[0]} does not exist. Nothing was added.")
    changes: dict[str, str] = {}
    rejected: list[RejectedFile] = []
    with terminal.database(database) as connection:
        for path, change in _changes(connection, paths):
            if isinstance(change, RejectedFile):
                rejected.append(change)
                terminal.complain(f"{change} Skipped.")
                continue
            changes[source_name(path)], detail = change
            if not as_json:
                typer.echo(f"{changes[source_name(path)]}: {path}{detail}")
    if as_json:
        terminal.print_json({"files": changes, "refused": {str(file.path): file.reason for file in rejected}})
    if rejected:
        raise typer.Exit(terminal.EXIT_SOME_BAD)


def _changes(
    connection: Connection, paths: list[Path]
) -> Iterator[tuple[Path, tuple[str, str] | RejectedFile]]:
    """Stores and commits each file; yields its path with the change and a detail, or its rejection."""
    for path, file in _read(paths):
        if isinstance(file, RejectedFile):
            yield path, file
            continue
        change = add_file(connection, path, file)
        connection.commit()
        yield path, (change, f" ({len(file.entries):,} entries)")
    for folder in filter(Path.is_dir, paths):
        present = files_in(folder)
        for source in remove_missing(connection, folder, present) if present else ():
            yield Path(source), ("removed", ": the file is gone")
        connection.commit()


def _read(paths: list[Path]) -> Iterator[tuple[Path, KnowledgeFile | RejectedFile]]:
    for given in paths:
        inside = files_in(given) if given.is_dir() else [given]
        if not inside:
            yield given, RejectedFile(given, "contains no files")
        for path in inside:
            folder = given.resolve().name
            name = f"{folder}/{path.relative_to(given).as_posix()}" if given.is_dir() else path.name
            within = given if given.is_dir() else None
            yield path, read_file(path, key=source_name(path), name=name, within=within)


@knowledge.command(help=REMOVE_HELP)
def remove(paths: Paths, *, as_json: terminal.Json = False, database: terminal.Database = None) -> None:
    removed: list[str] = []
    unknown: list[Path] = []
    with terminal.database(database) as connection:
        for path in paths:
            found = remove_path(connection, path)
            removed += found
            if not found:
                unknown.append(path)
                terminal.complain(f"{path} is not an added file or folder; see router knowledge list.")
    if as_json:
        terminal.print_json({"removed": removed, "unknown": unknown})
    else:
        for source in removed:
            typer.echo(f"removed: {source}")
    if unknown:
        raise typer.Exit(terminal.EXIT_SOME_BAD)


@knowledge.command("list", help=LIST_HELP)
def list_sources(*, as_json: terminal.Json = False, database: terminal.Database = None) -> None:
    with terminal.database(database) as connection:
        found = read_sources(connection)
    if as_json:
        terminal.print_json(found)
        return
    if not found:
        typer.echo("No files added. See router knowledge add --help.")
        return
    table = terminal.quiet_table("file", "entries", "changed", right=("entries",))
    for source in found:
        table.add_row(source.source, f"{source.entries:,}", f"{terminal.ago(source.changed_at)} ago")
    terminal.out().print(table)


@knowledge.command(help=SEARCH_HELP)
def search(
    question: Annotated[str, typer.Argument(metavar="TEXT", help="Text to search for.")],
    *,
    limit: Annotated[int, typer.Option(metavar="N", min=1, max=100, help="Maximum number of passages.")] = 5,
    client: Annotated[str, typer.Option(metavar="CLIENT", help="Search as this client. Default: ''.")] = "",
    as_json: terminal.Json = False,
    database: Annotated[
        Optional[str],  # noqa: UP045 - typer evaluates it at run time, also on 3.10
        typer.Option(metavar="URL", envvar="ROUTER_DATABASE_URL", help="Postgres; optional."),
    ] = None,
    config: terminal.Config = terminal.DEFAULT_CONFIG,
) -> None:
    found, entries = asyncio.run(_search(question, limit, checked_client(client), database, config))
    if as_json:
        terminal.print_json({**dataclasses.asdict(found), "knows": found.is_relevant, "entries": entries})
        return
    for number, passage in enumerate(found.passages, 1):
        typer.echo(f"[{number}] {passage.source}   score {passage.score:.2f}")
        for line in passage.text.splitlines()[:PREVIEW_LINES]:
            typer.echo(f"    {line}")
    verdict = "relevant" if found.is_relevant else "not relevant"
    typer.echo(f"{verdict}: confidence {found.confidence:.0%}, {entries:,} entries searched")


async def _search(
    question: str, limit: int, client: str, database: str | None, config: Path
) -> tuple[SearchResult, int]:
    opening = Knowledge.open(
        config / "knowledge", database_url=database, data_folder=data_folder(),
        tasks=load_config(config).knowledge.tasks, keep_updated=False,
    )  # fmt: skip
    async with opening as opened:
        try:
            if not await opened.update():
                terminal.note(BUSY_NOTE)
        except RouterError as error:
            terminal.note(f"Searching the existing index of this host, which could not be updated: {error}")
        return await opened.search(question, limit, client), opened.entries


@knowledge.command(help=EVALUATE_HELP)
def evaluate(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder with the three files.")],
    *,
    as_json: terminal.Json = False,
) -> None:
    report = evaluate_retrieval(read_collection(folder))
    if as_json:
        terminal.print_json({"folder": str(folder), **dataclasses.asdict(report)})
        return
    typer.echo(
        f"{report.queries:,} questions, {report.documents:,} documents: hit@1 {report.hit_at_1:.3f},"
        f" hit@5 {report.hit_at_5:.3f}, MRR {report.mrr:.3f}"
    )
    typer.echo(
        f"{report.milliseconds_p50:.2f} ms per question (p99 {report.milliseconds_p99:.2f} ms),"
        f" index built in {report.build_seconds:.2f} s"
    )
