"""`router load`: adds prompts from files to the queue."""

from __future__ import annotations

import io
import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from router.cli import terminal
from router.database import Connection, rows
from router.errors import InputError, echoed
from router.models import check_queued_request
from router.queue import (
    MAX_PRIORITY,
    Format,
    IngestDefaults,
    InvalidRow,
    NewTask,
    category_names,
    decompressed,
    detect_format,
    enqueue,
    max_prompt_bytes,
    read_tasks,
)
from router.settings import load_config
from router.task import checked_client

BATCH_TASKS = 2000
BATCH_CHARACTERS = 4 * 1024 * 1024
MAX_SHOWN_ERRORS = 20
MAX_SHOWN_CATEGORIES = 5
MAX_NAME_CHARACTERS = 50
STANDARD_INPUT = "-"

HELP = """
Add prompts from files or standard input to the queue.

\b
Formats, also gzipped:
  openai  OpenAI Batch API, one object per line:
          {"custom_id", "method", "url", "body": {"model", "messages", ...}}
  jsonl   one object per line, only prompt is required:
          {"prompt", "category", "priority", "id", "max_tokens",
          "deadline_at"}, and the parameters of a request, such as
          messages, model, temperature, response_format, tools;
          lines of the format openai are accepted too
  csv     a header with prompt and optionally the other fields of jsonl;
          separated by comma, semicolon or tab
  text    one prompt per line

Requests are kept whole: messages with their roles, parameters, tools, the format of the answer, and the
model that must answer. What the Models Backend or the model cannot do is refused, line by line.

Loading a file again adds nothing. A row is identified by its id, or else by its client, its prompt and how
often the file has repeated it. Invalid rows are listed and skipped; the exit code is then 3.

\b
Examples:
  router load prompts.jsonl
  router load questions.csv --category technical --priority 5
  router load batch-2.jsonl --id-prefix batch-2/ --client alice
  generate-prompts | router load - --format text --json
"""


@dataclass
class Loaded:
    """Result of `router load`: `read` = `added` + `known` (already present) + `bad`; the first `errors`."""

    files: list[str] = field(default_factory=list)
    read: int = 0
    added: int = 0
    known: int = 0
    bad: int = 0
    seconds: float = 0.0
    errors: list[dict[str, Any]] = field(default_factory=list)
    unknown_categories: list[str] = field(default_factory=list)


def load(
    files: Annotated[
        list[str], typer.Argument(metavar="FILE", help="Files with prompts; - reads standard input.")
    ],
    *,
    file_format: Annotated[
        Format | None,
        typer.Option(
            "--format",
            metavar="openai|jsonl|csv|text",
            help="Format of the files. Default: detected from the suffix, or the first line.",
        ),
    ] = None,
    category: Annotated[
        str | None,
        typer.Option(metavar="CATEGORY", help="Category of rows without one. Default: classified."),
    ] = None,
    priority: Annotated[
        int,
        typer.Option(
            metavar=f"{-MAX_PRIORITY}..{MAX_PRIORITY}",
            min=-MAX_PRIORITY,
            max=MAX_PRIORITY,
            help="Priority of rows without one; higher goes first.",
        ),
    ] = 0,
    client: Annotated[
        str, typer.Option(metavar="NAME", help="Client of all rows. Default: the empty client.")
    ] = "",
    model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Model of all rows, or auto: the router chooses. Default: the model that a row names.",
        ),
    ] = None,
    id_prefix: Annotated[
        str, typer.Option(metavar="TEXT", help="Prefix for the ids of rows. Default: none.")
    ] = "",
    as_json: terminal.Json = False,
    database: terminal.Database = None,
) -> None:
    with ExitStack() as stack:
        opened = [_open(name, stack) for name in files]  # a missing file is an error before anything is added
        connection = stack.enter_context(terminal.database(database))
        names = category_names(connection)
        if category is not None:
            terminal.known(category, names, "category")
        models = [
            row["model"] for row in rows(connection, "SELECT model FROM roster WHERE state <> 'retired'")
        ]
        if model not in {None, "auto"}:
            terminal.known(model, models, "model")
        rules = IngestDefaults(
            category, priority, max_prompt_bytes(connection), id_prefix, checked_client(client), model,
            partial(check_queued_request, load_config(), frozenset(models)),
        )  # fmt: skip
        connection.commit()
        loading = _Load(connection, rules, frozenset(names), as_json=as_json)
        for name, stream in opened:
            loading.load(name, stream, file_format)
    loading.report()


def _open(name: str, stack: ExitStack) -> tuple[str, io.BufferedReader]:
    if name == STANDARD_INPUT:
        if sys.stdin is None:
            raise InputError("Standard input is closed. Nothing was loaded.")
        return "standard input", io.BufferedReader(io.FileIO(sys.stdin.fileno(), closefd=False))
    try:
        return name, stack.enter_context(Path(name).open("rb"))
    except OSError as error:
        raise InputError(f"{name} cannot be read: {error.strerror or error}. Nothing was loaded.") from error


class _Load:
    """One run: adds tasks in batches and counts them."""

    def __init__(
        self,
        connection: Connection,
        rules: IngestDefaults,
        known_categories: frozenset[str],
        *,
        as_json: bool,
    ) -> None:
        self._connection = connection
        self._rules = rules
        self._categories = known_categories
        self._as_json = as_json
        self._started = time.monotonic()
        self._done = Loaded()

    def load(self, name: str, stream: io.BufferedReader, file_format: Format | None) -> None:
        """Loads one file. Batches that were added stay, even after an error."""
        self._done.files.append(name)
        try:
            with self._progress() as progress:
                shown = progress.add_task(name, total=_size(stream), added=0)
                for batch in self._batches(name, stream, file_format):
                    self._add(name, batch)
                    at = stream.raw.tell() if stream.seekable() else 0
                    progress.update(shown, completed=at, added=self._done.added)
        except BaseException:
            added = self._done.added
            terminal.complain(
                f"Interrupted: {added:,} tasks were added. Run the same command again to continue."
            )
            raise

    def _progress(self) -> Progress:
        return Progress(
            TextColumn("{task.description}", markup=False), BarColumn(40),
            TextColumn("{task.percentage:>3.0f} %"),
            TextColumn("{task.fields[added]:,} added"), TimeElapsedColumn(),
            console=terminal.err(), transient=True, disable=self._as_json or not sys.stderr.isatty(),
        )  # fmt: skip

    def _batches(
        self, name: str, stream: io.BufferedReader, file_format: Format | None
    ) -> Iterator[list[NewTask]]:
        content = decompressed(stream)
        kind = file_format or detect_format(name, content)
        batch: list[NewTask] = []
        characters = 0
        for item in read_tasks(content, kind, self._rules):
            self._done.read += 1
            if isinstance(item, InvalidRow):
                self._bad(name, item.line, item.problem)
                continue
            batch.append(self._with_known_category(item))
            characters += len(item.prompt)
            if len(batch) >= BATCH_TASKS or characters >= BATCH_CHARACTERS:
                yield batch
                batch, characters = [], 0
        if batch:
            yield batch

    def _with_known_category(self, task: NewTask) -> NewTask:
        if task.category is None or task.category in self._categories:
            return task
        unknown, name = self._done.unknown_categories, task.category[:MAX_NAME_CHARACTERS]
        if name not in unknown and len(unknown) < MAX_SHOWN_CATEGORIES:
            unknown.append(name)
        return replace(task, category=self._rules.category)

    def _add(self, name: str, batch: list[NewTask]) -> None:
        result = enqueue(self._connection, batch)
        self._done.added += result.added
        self._done.known += result.known
        for conflict in result.conflicts:
            problem = (
                f"the id {echoed(conflict.external_id)} belongs to task {conflict.task_id}, which has another"
                " prompt; use another id or --id-prefix"
            )
            self._bad(name, conflict.line, problem)

    def _bad(self, name: str, line: int, problem: str) -> None:
        self._done.bad += 1
        if len(self._done.errors) < MAX_SHOWN_ERRORS:
            self._done.errors.append({"file": name, "line": line, "problem": problem})
            self._complain(f"{name}:{line}: {problem}")
        elif self._done.bad == MAX_SHOWN_ERRORS + 1:
            self._complain("... further invalid rows are counted but not listed.")

    def _complain(self, message: str) -> None:
        if not self._as_json:  # JSON output lists them in `errors`
            terminal.complain(message)

    def report(self) -> None:
        """Prints the result. Raises typer.Exit with code 3 if a row was invalid."""
        done = self._done
        done.seconds = round(time.monotonic() - self._started, 3)
        if self._as_json:
            terminal.print_json(done)
        else:
            rate = done.read / max(done.seconds, 0.001)
            parts = [f"{done.added:,} added", f"{done.known:,} already present", f"{done.bad:,} invalid"]
            shown = [part for part in parts if not part.startswith("0 ") or part == parts[0]]
            typer.echo(f"{' · '.join(shown)}   ({done.seconds:.1f} s, {rate:,.0f} rows/s)")
            if done.unknown_categories:
                names = ", ".join(done.unknown_categories)
                instead = f"set to {self._rules.category}" if self._rules.category else "classified"
                terminal.note(f"Unknown categories: {names}. These rows are {instead} instead.")
        if done.bad:
            raise typer.Exit(terminal.EXIT_SOME_BAD)


def _size(stream: io.BufferedReader) -> int | None:
    """Returns the size in bytes; None for a pipe."""
    return os.fstat(stream.fileno()).st_size if stream.seekable() else None
