"""The verbs `router knowledge ...`: what the router answers with when no model does."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Optional

import typer

from router.cli import terminal
from router.errors import InputError, RouterError
from router.knowledge import (
    Knowledge,
    KnowledgeFile,
    Refused,
    SearchResult,
    add_file,
    evaluate_retrieval,
    files_in,
    read_collection,
    read_file,
    read_sources,
    remove_path,
    source_name,
)
from router.settings import data_folder

KNOWLEDGE_HELP = """
What the router answers with when no model does.

It is found in the files of config/knowledge, in files that were added here, and in tasks that were solved
before. Added files are kept in Postgres: every host finds them within a minute.
"""
ADD_HELP = """
Add files, or all files of folders: Markdown, text, reStructuredText, or JSON lines with "text" and "title".

Adding a file again replaces what it held. A file that is not text is named and left out.

\b
Examples:
  router knowledge add handbook.md
  router knowledge add notes/ faq.jsonl
"""
REMOVE_HELP = """
Forget files that were added, or all beneath a folder. They need not exist any more.

\b
Examples:
  router knowledge remove handbook.md
  router knowledge remove notes/
"""
LIST_HELP = """
Show which files were added.

\b
Examples:
  router knowledge list
  router knowledge list --json | jq -r .[].source
"""
SEARCH_HELP = """
Show what is found for a question, and how sure that is.

Without a database config/knowledge alone is searched.

\b
Examples:
  router knowledge search "How do I pause a model?"
  router knowledge search "refund after 30 days" --limit 3 --json
"""
EVALUATE_HELP = """
Measure how well is found: a folder with corpus.jsonl, queries.jsonl and qrels.tsv.

Prints how often a relevant document comes first, or among the first five, the mean reciprocal rank, and
times.

\b
Examples:
  router knowledge evaluate collections/cranfield
  router knowledge evaluate collections/cranfield --json
"""
SHOWN_LINES = 6

knowledge = terminal.verbs()

Paths = Annotated[list[Path], typer.Argument(metavar="PATH...", help="Files and folders.")]


@knowledge.command(help=ADD_HELP)
def add(paths: Paths, *, as_json: terminal.Json = False, database: terminal.Database = None) -> None:
    missing = [str(path) for path in paths if not path.exists()]
    if missing:
        raise InputError(f"{missing[0]} does not exist. Nothing was added.")
    became: dict[str, str] = {}
    refused: list[Refused] = []
    with terminal.database(database) as connection:
        for path, file in _read(paths):
            if isinstance(file, Refused):
                refused.append(file)
                terminal.complain(f"{file} It was left out.")
                continue
            became[source_name(path)] = add_file(connection, path, file)
            connection.commit()
            if not as_json:
                typer.echo(f"{became[source_name(path)]}: {path} ({len(file.entries):,} entries)")
    if as_json:
        terminal.print_json({"files": became, "refused": {str(file.path): file.why for file in refused}})
    if refused:
        raise typer.Exit(terminal.EXIT_SOME_BAD)


def _read(paths: list[Path]) -> Iterator[tuple[Path, KnowledgeFile | Refused]]:
    for given in paths:
        inside = files_in(given) if given.is_dir() else [given]
        if not inside:
            yield given, Refused(given, "holds no file")
        for path in inside:
            folder = given.resolve().name
            name = f"{folder}/{path.relative_to(given).as_posix()}" if given.is_dir() else path.name
            try:
                yield path, read_file(path, key=source_name(path), name=name)
            except InputError as error:
                yield path, Refused(path, str(error).removeprefix(f"{path} ").removesuffix("."))


@knowledge.command(help=REMOVE_HELP)
def remove(paths: Paths, *, as_json: terminal.Json = False, database: terminal.Database = None) -> None:
    gone: list[str] = []
    unknown: list[Path] = []
    with terminal.database(database) as connection:
        for path in paths:
            removed = remove_path(connection, path)
            gone += removed
            if not removed:
                unknown.append(path)
                terminal.complain(f"{path} was never added, or is removed; see router knowledge list.")
    if as_json:
        terminal.print_json({"removed": gone, "unknown": unknown})
    else:
        for source in gone:
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
        typer.echo("No file was added yet; see router knowledge add --help.")
        return
    table = terminal.quiet_table("file", "entries", "changed", right=("entries",))
    for source in found:
        table.add_row(source.source, f"{source.entries:,}", f"{terminal.ago(source.changed_at)} ago")
    terminal.out().print(table)


@knowledge.command(help=SEARCH_HELP)
def search(
    question: Annotated[str, typer.Argument(help="What to look for.")],
    *,
    limit: Annotated[int, typer.Option(min=1, max=100, help="At most so many passages.")] = 5,
    as_json: terminal.Json = False,
    database: Annotated[
        Optional[str],  # noqa: UP045 - typer evaluates it at run time, also on 3.10
        typer.Option(metavar="URL", envvar="ROUTER_DATABASE_URL", help="Postgres; optional here."),
    ] = None,
    config: terminal.Config = terminal.DEFAULT_CONFIG,
) -> None:
    found, entries = asyncio.run(_search(question, limit, database, config))
    if as_json:
        terminal.print_json({**dataclasses.asdict(found), "knows": found.knows, "entries": entries})
        return
    for place, passage in enumerate(found.passages, 1):
        typer.echo(f"[{place}] {passage.source}   score {passage.score:.2f}")
        for line in passage.text.splitlines()[:SHOWN_LINES]:
            typer.echo(f"    {line}")
    word = "knows" if found.knows else "no knowledge"
    typer.echo(f"{word}: confidence {found.confidence:.0%}, {entries:,} entries searched")


async def _search(question: str, limit: int, database: str | None, config: Path) -> tuple[SearchResult, int]:
    opening = Knowledge.open(
        config / "knowledge", database_url=database, data_folder=data_folder(), follow=False
    )
    async with opening as opened:
        try:
            await opened.catch_up()
        except RouterError as error:
            terminal.note(f"Only what this host has already is searched: {error}")
        return await opened.search(question, limit), opened.entries


@knowledge.command(help=EVALUATE_HELP)
def evaluate(
    folder: Annotated[Path, typer.Argument(help="The folder of the three files.")],
    *,
    as_json: terminal.Json = False,
) -> None:
    trial = evaluate_retrieval(read_collection(folder))
    if as_json:
        terminal.print_json({"folder": str(folder), **dataclasses.asdict(trial)})
        return
    typer.echo(
        f"{trial.queries:,} questions to {trial.documents:,} documents: hit@1 {trial.hit_at_1:.3f},"
        f" hit@5 {trial.hit_at_5:.3f}, MRR {trial.mrr:.3f}"
    )
    typer.echo(
        f"{trial.milliseconds_p50:.2f} ms a question (p99 {trial.milliseconds_p99:.2f} ms),"
        f" built in {trial.build_seconds:.2f} s"
    )
