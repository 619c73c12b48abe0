"""Assembles the command `router` from the modules of its subcommands."""

from __future__ import annotations

import logging
from importlib.metadata import version
from typing import Annotated

import typer

from router.cli import terminal
from router.cli.ask import ASK_HELP, ask
from router.cli.audit import AUDIT_HELP, audit
from router.cli.categories import CATEGORIES_HELP, categories
from router.cli.clients import CLIENTS_HELP, clients
from router.cli.discovery import (
    PROMOTE_HELP,
    RETIRE_HELP,
    REVIEW_PROBATION_HELP,
    SEARCH_HELP,
    UNDO_HELP,
    promote,
    retire,
    review_models,
    search,
    undo,
)
from router.cli.doctor import DOCTOR_HELP, MIGRATE_HELP, doctor, migrate
from router.cli.keys import KEYS_HELP, keys
from router.cli.knowledge import KNOWLEDGE_HELP, knowledge
from router.cli.load import HELP as LOAD_HELP
from router.cli.load import load
from router.cli.log import LOG_HELP, log
from router.cli.models import MODELS_HELP, TRAFFIC_HELP, models, traffic
from router.cli.output import guard_streams
from router.cli.ranking import RANKING_HELP, ranking
from router.cli.review import FEEDBACK_HELP, REVIEW_HELP, feedback, review
from router.cli.serve import SERVE_HELP, serve
from router.cli.status import STATUS_HELP, WATCH_HELP, status, watch
from router.cli.tasks import EXPORT_HELP, RETRY_HELP, export, retry
from router.cli.terminal import ADMINISTRATION, ANSWERS, MODELS, QUEUE
from router.database import act_as

HELP = """
Route LLM prompts from a Postgres queue to the best model for each, within per-model rate limits.

Prompts are rows of the Postgres table tasks. Airflow runs the workers that send them to models.

\b
Exit codes:
  0  success
  1  failed; one message on standard error gives the reason
  2  invalid usage
  3  completed with errors; each failed row or task is listed
"""
app = terminal.verbs(help=HELP, add_completion=True)


def _print_version(wanted: bool) -> None:  # noqa: FBT001 - typer's interface
    if wanted:
        typer.echo(f"router {version('llm-router')}")
        raise typer.Exit


@app.callback(help=HELP)
def _router(
    *,
    _version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    act_as(terminal.os_user(), "cli")


app.command(help=LOAD_HELP, rich_help_panel=QUEUE)(load)
app.command(help=STATUS_HELP, rich_help_panel=QUEUE)(status)
app.command(help=WATCH_HELP, rich_help_panel=QUEUE)(watch)
app.command(help=CLIENTS_HELP, rich_help_panel=QUEUE)(clients)
app.command(help=LOG_HELP, rich_help_panel=QUEUE)(log)
app.command(help=EXPORT_HELP, rich_help_panel=QUEUE)(export)
app.command(help=RETRY_HELP, rich_help_panel=QUEUE)(retry)

models.command(help=SEARCH_HELP)(search)
models.command("review", help=REVIEW_PROBATION_HELP)(review_models)
models.command(help=PROMOTE_HELP)(promote)
models.command(help=RETIRE_HELP)(retire)
models.command(help=UNDO_HELP)(undo)
app.add_typer(models, name="models", help=MODELS_HELP, rich_help_panel=MODELS)
app.command(help=TRAFFIC_HELP, rich_help_panel=MODELS)(traffic)
app.add_typer(ranking, name="ranking", help=RANKING_HELP, rich_help_panel=MODELS)
app.command(help=REVIEW_HELP, rich_help_panel=MODELS)(review)

app.command(help=ASK_HELP, rich_help_panel=ANSWERS)(ask)
app.command(help=FEEDBACK_HELP, rich_help_panel=ANSWERS)(feedback)
app.add_typer(categories, name="categories", help=CATEGORIES_HELP, rich_help_panel=ANSWERS)
app.add_typer(knowledge, name="knowledge", help=KNOWLEDGE_HELP, rich_help_panel=ANSWERS)

app.command(help=SERVE_HELP, rich_help_panel=ADMINISTRATION)(serve)
app.add_typer(keys, name="keys", help=KEYS_HELP, rich_help_panel=ADMINISTRATION)
app.command(help=AUDIT_HELP, rich_help_panel=ADMINISTRATION)(audit)
app.command(help=MIGRATE_HELP, rich_help_panel=ADMINISTRATION)(migrate)
app.command(help=DOCTOR_HELP, rich_help_panel=ADMINISTRATION)(doctor)


def main() -> None:
    """Runs the command line; entry point of the console script `router`."""
    # Commands print an outage of Redis themselves; without a handler Python would print the log line, too.
    limiter = logging.getLogger("router.limiter")
    limiter.addHandler(logging.NullHandler())
    limiter.propagate = False
    guard_streams()
    app(prog_name="router")
