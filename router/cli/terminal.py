"""What all verbs share: where things are, how they speak to a terminal, and how they end.

Exit codes: 0 done, 1 could not be done (one message on standard error), 2 wrong usage, 3 done but for some
lines or tasks, each of which was named.
"""

from __future__ import annotations

import dataclasses
import getpass
import json
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
import typer.core
from rich.console import Console
from rich.table import Table

from router.database import Connection, connect
from router.errors import ConfigError, RouterError, unknown
from router.models import AirflowApi
from router.queue import require_schema
from router.settings import DEFAULT_CONFIG_FOLDER

EXIT_FAILED = 1
EXIT_SOME_BAD = 3
PIPED_COLUMNS = 120  # a table that is not read in a terminal is not folded to 80

Database = Annotated[
    Optional[str],  # noqa: UP045 - typer evaluates this at run time, also on 3.10
    typer.Option(
        "--database", metavar="URL", envvar="ROUTER_DATABASE_URL", help="Postgres that holds the tasks."
    ),
]
Redis = Annotated[
    Optional[str],  # noqa: UP045 - as above
    typer.Option("--redis", metavar="URL", envvar="ROUTER_REDIS_URL", help="Redis that holds the limiter."),
]
Config = Annotated[
    Path,
    typer.Option("--config", metavar="FOLDER", envvar="ROUTER_CONFIG", help="The folder of models.yaml."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, for programs.")]
By = Annotated[
    Optional[str],  # noqa: UP045 - as above
    typer.Option("--by", help="Who does it, for the history. Default: your user name."),
]
AirflowUrl = Annotated[
    Optional[str],  # noqa: UP045 - as above
    typer.Option("--airflow", metavar="URL", envvar="ROUTER_AIRFLOW_URL", help="Where Airflow's page is."),
]
AirflowUser = Annotated[
    Optional[str],  # noqa: UP045 - as above
    typer.Option("--airflow-user", envvar="ROUTER_AIRFLOW_USER", help="Who may edit Variables."),
]
AirflowPassword = Annotated[
    Optional[str],  # noqa: UP045 - as above
    typer.Option(
        "--airflow-password", envvar="ROUTER_AIRFLOW_PASSWORD", help="Better given by the environment."
    ),
]
DEFAULT_CONFIG = DEFAULT_CONFIG_FOLDER
AIRFLOW_SECONDS = 5.0


class RouterGroup(typer.core.TyperGroup):
    """The verbs; an error that the router raises on purpose becomes one message and exit code 1."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except RouterError as error:
            complain(f"router: {error}")
            raise typer.Exit(EXIT_FAILED) from error
        except UnicodeEncodeError as error:
            complain("router: an argument is no text in UTF-8.")
            raise typer.Exit(EXIT_FAILED) from error


def verbs(**arguments: Any) -> typer.Typer:
    """A group of verbs, with plain help texts and without tracebacks."""
    return typer.Typer(
        cls=RouterGroup,
        no_args_is_help=not arguments.get("invoke_without_command", False),
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
        **arguments,
    )


def out() -> Console:
    """Standard output."""
    return _console(stderr=False)


def err() -> Console:
    """Standard error: progress and notes, so that output can be piped."""
    return _console(stderr=True)


def _console(*, stderr: bool) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() or os.environ.get("COLUMNS") else PIPED_COLUMNS
    return Console(stderr=stderr, width=width, highlight=False, soft_wrap=False)


def complain(message: str) -> None:
    """Say on standard error what is wrong."""
    err().print(message, style="red", markup=False, soft_wrap=True)


def note(message: str) -> None:
    """Say on standard error what is worth knowing."""
    err().print(message, style="yellow", markup=False, soft_wrap=True)


def print_json(value: Any, *, indent: int | None = 2) -> None:
    """Print a value as JSON; dataclasses become objects and moments ISO 8601 with their offset."""
    typer.echo(as_json(value, indent=indent))


def as_json(value: Any, *, indent: int | None = 2) -> str:
    """What print_json prints."""
    return json.dumps(value, ensure_ascii=False, indent=indent, default=_plain)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, datetime):
        return value.isoformat()
    return str(value)


def required(value: str | None, name: str, example: str) -> str:
    """The option's value; ConfigError names the environment variable that would give it."""
    if not (value or "").strip():
        raise ConfigError(
            f"{name} is not set. Set it, e.g. {name}={example}, or source the demo's router.env."
        )
    return str(value)


@contextmanager
def database(url: str | None) -> Iterator[Connection]:
    """A connection to a database that `router migrate` has prepared."""
    with connect(database_url(url)) as connection:
        require_schema(connection)
        yield connection


def airflow(url: str | None, user: str | None, password: str | None) -> AirflowApi | None:
    """Airflow's REST API, if it is said where that is."""
    return AirflowApi(url, user or "", password or "", timeout_seconds=AIRFLOW_SECONDS) if url else None


def database_url(url: str | None) -> str:
    return required(url, "ROUTER_DATABASE_URL", "postgresql://user@host/database")


def known(name: str, names: Iterable[str], what: str) -> str:
    """Returns `name` if it is one of `names`. Raises InputError that offers the closest, or lists them all."""
    names = list(names)
    if name not in names:
        raise unknown(name, names, what)
    return name


def quiet_table(*columns: str, right: Iterable[str] = ()) -> Table:
    """A table without lines; the columns in `right` hold numbers."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    for name in columns:
        table.add_column(name, justify="right" if name in right else "left", no_wrap=name == columns[0])
    return table


def ago(moment: datetime | None) -> str:
    """How long ago, in one number: `12 s`, `5 min`, `3 h`, `2 d`; empty for None."""
    if moment is None:
        return ""
    seconds = max(0.0, (datetime.now(timezone.utc) - moment).total_seconds())
    for size, unit in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def who(by: str | None) -> str:
    """`by`, or the name of whoever calls."""
    if by:
        return by
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return "somebody"
