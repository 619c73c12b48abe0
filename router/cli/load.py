"""The verb `router load`: files of prompts become tasks."""

from __future__ import annotations

import io
import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from router.cli import terminal
from router.database import Connection
from router.errors import InputError
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

BATCH_TASKS = 2000
BATCH_CHARACTERS = 4 * 1024 * 1024
SHOWN_BAD_LINES = 20
SHOWN_CATEGORIES = 5
LONGEST_SHOWN_NAME = 50
STANDARD_INPUT = "-"

HELP = """
Load prompts from files or standard input, as tasks to be solved.

\b
Formats, also gzipped:
  openai  {"custom_id", "method", "url", "body": {"messages", "max_tokens"}} a line
  jsonl   {"prompt", "category", "priority", "id", "max_tokens", "deadline_at"}
          a line, of which only prompt must be there; or openai's lines
  csv     a header that names prompt, and any other of jsonl's fields;
          comma, semicolon or tab
  text    one prompt a line

A chat becomes one prompt: its system messages, an empty line, the user's message; a longer chat keeps its
turns, headed "User:" and "Assistant:".

Loading the same file again adds nothing: a row is known by its own id, else by its prompt and how often the
file has asked it before. A line that cannot be read is named, the others are loaded, and the exit code is 3.

\b
Examples:
  router load prompts.jsonl
  router load questions.csv --category technical --priority 5
  router load batch-2.jsonl --id-prefix batch-2/
  generate-prompts | router load - --format text --json
"""


@dataclass
class Loaded:
    """What `router load` did: `read` = `added` + `known` (there already) + `bad`; `errors`: the first few."""

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
        list[str], typer.Argument(metavar="FILE", help="Files of prompts; - is standard input.")
    ],
    *,
    file_format: Annotated[
        Optional[Format],  # noqa: UP045 - typer evaluates it at run time, also on 3.10
        typer.Option("--format", help="Default: by the file's suffix, else by its first line."),
    ] = None,
    category: Annotated[
        Optional[str],  # noqa: UP045 - as above
        typer.Option(help="For rows that name none. Default: the router decides by the prompt."),
    ] = None,
    priority: Annotated[
        int,
        typer.Option(min=-MAX_PRIORITY, max=MAX_PRIORITY, help="For rows that name none; higher goes first."),
    ] = 0,
    id_prefix: Annotated[str, typer.Option(help="Put before the ids that rows name. Default: nothing.")] = "",
    as_json: terminal.Json = False,
    database: terminal.Database = None,
) -> None:
    with ExitStack() as stack:
        opened = [_open(name, stack) for name in files]  # all of them, before anything is added
        connection = stack.enter_context(terminal.database(database))
        names = category_names(connection)
        if category is not None:
            terminal.known(category, names, "category")
        rules = IngestDefaults(category, priority, max_prompt_bytes(connection), id_prefix)
        connection.commit()
        loading = _Loading(connection, rules, frozenset(names), as_json=as_json)
        for name, stream in opened:
            loading.load(name, stream, file_format)
    loading.tell()


def _open(name: str, stack: ExitStack) -> tuple[str, io.BufferedReader]:
    if name == STANDARD_INPUT:
        if sys.stdin is None:
            raise InputError("Standard input is closed. Nothing was loaded.")
        return "standard input", io.BufferedReader(io.FileIO(sys.stdin.fileno(), closefd=False))
    try:
        return name, stack.enter_context(Path(name).open("rb"))
    except OSError as error:
        raise InputError(f"{name} cannot be read: {error.strerror or error}. Nothing was loaded.") from error


class _Loading:
    """One run: reads, adds batch by batch, and keeps count."""

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
        """Load one file; what was added stays, whatever ends it."""
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
            terminal.complain(f"Broken off: {added:,} tasks were added; the same command goes on from there.")
            raise

    def _progress(self) -> Progress:
        return Progress(
            TextColumn("{task.description}"), BarColumn(40), TextColumn("{task.percentage:>3.0f} %"),
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
        unknown, name = self._done.unknown_categories, task.category[:LONGEST_SHOWN_NAME]
        if name not in unknown and len(unknown) < SHOWN_CATEGORIES:
            unknown.append(name)
        return replace(task, category=self._rules.category)

    def _add(self, name: str, batch: list[NewTask]) -> None:
        result = enqueue(self._connection, batch)
        self._done.added += result.added
        self._done.known += result.known
        for conflict in result.conflicts:
            problem = (
                f"the id {conflict.external_id!r} belongs to task {conflict.task_id},"
                " which has another prompt; give it an id of its own, or load with --id-prefix"
            )
            self._bad(name, conflict.line, problem)

    def _bad(self, name: str, line: int, problem: str) -> None:
        self._done.bad += 1
        if len(self._done.errors) < SHOWN_BAD_LINES:
            self._done.errors.append({"file": name, "line": line, "problem": problem})
            self._complain(f"{name}:{line}: {problem}")
        elif self._done.bad == SHOWN_BAD_LINES + 1:
            self._complain("... further bad lines are only counted.")

    def _complain(self, message: str) -> None:
        if not self._as_json:  # there the object names them
            terminal.complain(message)

    def tell(self) -> None:
        """Say what was done; exit code 3 if a line was bad."""
        done = self._done
        done.seconds = round(time.monotonic() - self._started, 3)
        if self._as_json:
            terminal.print_json(done)
        else:
            rate = done.read / max(done.seconds, 0.001)
            parts = [f"{done.added:,} added", f"{done.known:,} there already", f"{done.bad:,} bad"]
            shown = [part for part in parts if not part.startswith("0 ") or part == parts[0]]
            typer.echo(f"{' · '.join(shown)}   ({done.seconds:.1f} s, {rate:,.0f} rows/s)")
            if done.unknown_categories:
                names = ", ".join(done.unknown_categories)
                instead = f"{self._rules.category} is taken" if self._rules.category else "the router decides"
                terminal.note(f"Categories that the config does not name: {names}. For these rows {instead}.")
        if done.bad:
            raise typer.Exit(terminal.EXIT_SOME_BAD)


def _size(stream: io.BufferedReader) -> int | None:
    """The file's bytes; None where nobody knows, as for a pipe."""
    return os.fstat(stream.fileno()).st_size if stream.seekable() else None
