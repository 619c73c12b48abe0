"""Shared by all commands: options, output, error messages and exit codes.

Exit codes: 0 success, 1 failed (one message on standard error), 2 invalid usage, 3 completed with errors
(each failed row or task is listed).
"""

from __future__ import annotations

import dataclasses
import getpass
import json
import re
import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core
from rich.console import Console
from rich.table import Table

from router.cli.output import console
from router.database import Connection, connect
from router.errors import (
    MAX_ECHOED,
    InputError,
    RouterError,
    echoed,
    first_line,
    printable,
    printable_json,
    unknown,
)
from router.models import AirflowApi
from router.queue import require_schema
from router.settings import (
    DEFAULT_CONFIG_FOLDER,
    RouterConfig,
    config_folder,
    load_config,
    missing_address,
    unknown_variables,
)
from router.status import record_audit

EXIT_FAILED = 1
EXIT_SOME_BAD = 3
UNCUT = 1000  # the formatter wraps what Click would cut
_UNITS = {"s": 1, "min": 60, "h": 3600, "d": 86_400}
_AGE = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)\s*(s|min|h|d)")

Database = Annotated[
    str | None,
    typer.Option(
        "--database", metavar="URL", envvar="ROUTER_DATABASE_URL", help="URL of the router's Postgres."
    ),
]
Redis = Annotated[
    str | None,
    typer.Option("--redis", metavar="URL", envvar="ROUTER_REDIS_URL", help="URL of the limiter's Redis."),
]
Config = Annotated[
    Path,
    typer.Option(
        "--config", metavar="FOLDER", envvar="ROUTER_CONFIG", help="Folder that contains models.yaml."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
By = Annotated[
    str | None,
    typer.Option("--by", metavar="NAME", help="Author recorded in the history. Default: your user name."),
]
AirflowUrl = Annotated[
    str | None,
    typer.Option("--airflow", metavar="URL", envvar="ROUTER_AIRFLOW_URL", help="URL of Airflow."),
]
AirflowUser = Annotated[
    str | None,
    typer.Option(
        "--airflow-user",
        metavar="NAME",
        envvar="ROUTER_AIRFLOW_USER",
        help="Airflow user who may edit Variables.",
    ),
]
AirflowPassword = Annotated[
    str | None,
    typer.Option(
        "--airflow-password",
        metavar="PASSWORD",
        envvar="ROUTER_AIRFLOW_PASSWORD",
        help="Password of the Airflow user; prefer the environment variable.",
    ),
]
DEFAULT_CONFIG = DEFAULT_CONFIG_FOLDER
AIRFLOW_SECONDS = 5.0
QUEUE, MODELS, ANSWERS, ADMINISTRATION = PANELS = ("Queue", "Models", "Answers", "Administration")


_NAMES: dict[str, Callable[[RouterConfig], Iterable[str]]] = {
    "MODEL": lambda config: [*config.models, *config.discovered],
    "CATEGORY": lambda config: config.categories,
}


def _complete(_context: Any, parameter: Any, incomplete: str) -> list[str]:
    """Returns the configured names that begin with `incomplete`; none without a valid config."""
    try:
        names = _NAMES[parameter.metavar](load_config(config_folder()))
    except RouterError:  # a shell has no place for it
        return []
    return [name for name in sorted(set(names)) if name.startswith(incomplete)]


def _complete_names(parameters: Iterable[Any]) -> None:
    for one in parameters:
        if one.metavar in _NAMES:
            one._custom_shell_complete = _complete  # noqa: SLF001 - Click takes it at creation only


class RouterCommand(typer.core.TyperCommand):
    """Command whose help shows arguments by their names, e.g. FILE..., without braces and types.

    Arguments and options named MODEL and CATEGORY are completed in a shell.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        _complete_names(self.params)

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        arguments = [_usage(one) for one in self.get_params(ctx) if one.param_type_name == "argument"]
        return [self.options_metavar or "", *arguments]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        records: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
        for one in self.get_params(ctx):
            record = one.get_help_record(ctx)
            if record is None:
                continue
            if one.param_type_name == "argument":
                records["Arguments"].append((_name(one), record[1].replace("[required]", "").rstrip()))
            else:
                records["Options"].append(record)
        for title, written in records.items():
            if written:
                with formatter.section(title):
                    formatter.write_dl(written)


def _name(argument: Any) -> str:
    return f"{argument.metavar or argument.name.upper()}{'...' if argument.nargs != 1 else ''}"


def _usage(argument: Any) -> str:
    return _name(argument) if argument.required else f"[{_name(argument)}]"


class RouterGroup(typer.core.TyperGroup):
    """Command group that lists its commands by panel, and turns a RouterError into one message."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        _complete_names(self.params)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        commands = {name: self.get_command(ctx, name) for name in self.list_commands(ctx)}
        panels: dict[str, list[tuple[str, str]]] = {panel: [] for panel in PANELS}
        for name, command in commands.items():
            if command is not None and not command.hidden:
                panel = getattr(command, "rich_help_panel", None)
                rows = panels.setdefault(panel if isinstance(panel, str) else "Commands", [])
                rows.append((name, command.get_short_help_str(UNCUT)))
        for panel, rows in panels.items():
            if rows:
                with formatter.section(panel):
                    formatter.write_dl(rows)

    def make_context(self, *arguments: Any, **options: Any) -> Any:
        with _short_usage_errors():
            return super().make_context(*arguments, **options)

    def invoke(self, ctx: Any) -> Any:
        if ctx.parent is None:
            for warning in unknown_variables():
                note(warning)
        try:
            with _short_usage_errors():
                return super().invoke(ctx)
        except RouterError as error:
            complain(f"router: {error}")
            raise typer.Exit(EXIT_FAILED) from error
        except UnicodeEncodeError as error:
            complain("router: an argument is not valid UTF-8.")
            raise typer.Exit(EXIT_FAILED) from error


@contextmanager
def _short_usage_errors() -> Iterator[None]:
    """Cuts the argument that a usage error repeats."""
    try:
        yield
    except Exception as error:
        if hasattr(error, "format_message"):  # Click's usage errors; typer does not export their base
            error.message = printable(error.message, MAX_ECHOED)  # type: ignore[attr-defined]
        raise


class _Commands(typer.Typer):
    def command(self, *arguments: Any, **options: Any) -> Any:
        return super().command(*arguments, **{"cls": RouterCommand, **options})


def verbs(**arguments: Any) -> typer.Typer:
    """Creates a command group with plain help texts and without tracebacks."""
    return _Commands(
        cls=RouterGroup,
        no_args_is_help=not arguments.get("invoke_without_command", False),
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
        **arguments,
    )


def out() -> Console:
    """Returns a console on standard output."""
    return console()


def err() -> Console:
    """Returns a console on standard error, for progress and notes."""
    return console(stderr=True)


def complain(message: str) -> None:
    """Prints an error on standard error."""
    err().print(message, style="red", soft_wrap=True)


def note(message: str) -> None:
    """Prints a warning on standard error."""
    err().print(message, style="yellow", soft_wrap=True)


def print_json(value: Any, *, indent: int | None = 2) -> None:
    """Prints a value as JSON; see `as_json`."""
    typer.echo(as_json(value, indent=indent))


def as_json(value: Any, *, indent: int | None = 2) -> str:
    """Returns a value as JSON; dataclasses become objects, and times ISO 8601 with their offset."""
    return printable_json(value, indent=indent, default=_plain)


def plain(value: Any) -> dict[str, Any]:
    """Returns a dataclass as a dictionary of values that JSON has."""
    return dict(json.loads(as_json(value)))


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, datetime):
        return value.isoformat()
    return str(value)


@contextmanager
def database(url: str | None) -> Iterator[Connection]:
    """Opens a connection and checks that the schema is current."""
    with connect(database_url(url)) as connection:
        require_schema(connection)
        yield connection


def audit(
    url: str | None, action: str, name: str, *, before: str | None = None, after: str | None = None
) -> None:
    """Records a change that Postgres does not see; a note tells if that is not possible."""
    if url is None or not url.strip():
        note(f"The audit log has no entry of `router {action}`: ROUTER_DATABASE_URL is not set.")
        return
    try:
        with connect(url) as connection:
            record_audit(connection, action, name, before=before, after=after)
    except RouterError as error:
        note(f"The audit log has no entry of `router {action}`: {first_line(error)}")


def os_user() -> str:
    """Returns user@host, as whom the command line appears in the audit log."""
    return f"{who(None)}@{socket.gethostname()}"


def airflow(url: str | None, user: str | None, password: str | None) -> AirflowApi | None:
    """Returns a client of Airflow's REST API; None without a URL."""
    return AirflowApi(url, user or "", password or "", timeout_seconds=AIRFLOW_SECONDS) if url else None


def database_url(url: str | None) -> str:
    """Returns the URL of Postgres. Raises ConfigError if it is not set."""
    if url is None or not url.strip():
        raise missing_address("ROUTER_DATABASE_URL")
    return url


def known(name: str, names: Iterable[str], what: str) -> str:
    """Returns `name` if it is in `names`. Raises InputError with the closest name, or with all."""
    names = list(names)
    if name not in names:
        raise unknown(name, names, what)
    return name


def quiet_table(*columns: str, right: Iterable[str] = ()) -> Table:
    """Creates a borderless table; the columns in `right` are right-aligned."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    for name in columns:
        table.add_column(name, justify="right" if name in right else "left", no_wrap=name == columns[0])
    return table


def age_seconds(text: str) -> float | None:
    """Returns the seconds of an age such as 90s, 30min, 2h or 7d; None if it is not one."""
    found = _AGE.fullmatch(text.strip())
    return None if found is None else float(found[1]) * _UNITS[found[2]]


def time_of(text: str, option: str) -> datetime:
    """Returns a time given as ISO 8601 or as an age. Without an offset it is in UTC. Raises InputError."""
    try:
        seconds = age_seconds(text)
        if seconds is not None:
            return datetime.now(timezone.utc) - timedelta(seconds=seconds)
        at = datetime.fromisoformat(text.strip().replace("Z", "+00:00"))
        return (at if at.tzinfo is not None else at.replace(tzinfo=timezone.utc)).astimezone(timezone.utc)
    except (ValueError, OverflowError) as error:
        raise InputError(
            f"{option} {echoed(text)} is neither a time nor an age. Give e.g. 2026-01-31,"
            " 2026-01-31T12:00:00Z, 30min, 2h or 7d."
        ) from error


def ago(at: datetime | None) -> str:
    """Formats the age of a time as `12 s`, `5 min`, `3 h` or `2 d`; empty for None."""
    if at is None:
        return ""
    seconds = max(0.0, (datetime.now(timezone.utc) - at).total_seconds())
    for size, unit in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def who(by: str | None) -> str:
    """Returns `by`, or the name of the current user."""
    if by:
        return by
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # in a container the user may have no name
        return "somebody"
