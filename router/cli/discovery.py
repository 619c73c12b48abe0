"""The verbs `router models search|promote|retire|undo`: better models found, and what becomes of them."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer
from rich.text import Text

from router.cli import terminal
from router.settings import addresses_from_environment, load_config, load_learning

if TYPE_CHECKING:
    from router.discovery import Decision, SearchReport

SHOWN = ("taken", "lost", "unreachable")

SEARCH_HELP = """
Search for better models now: read the catalogues, try what meets the criteria, take on what wins.

A candidate answers the same prompts as the model that is first in the category, through the Models Backend
and the limiter. If it is surely better it is taken on: on probation, with a small target of its own. That
takes as long as the answers do. One search runs at a time. Needs ROUTER_DATABASE_URL, ROUTER_REDIS_URL and
MODELS_BACKEND_URL.

\b
Examples:
  router models search --dry-run               who would be tried; nothing is sent
  router models search --category creative
  router models search --json

\b
--json prints one object: search (null: dry run), plans (category, incumbent, judge, prompts, passing,
candidates), findings (model, category, catalogue, verdict, reason, trial), notes.
"""
PROMOTE_HELP = """
Promote a model that is on probation: from now on it is ranked as any other.

\b
Examples:
  router models promote llama-4-maverick
"""
RETIRE_HELP = """
Retire a model that a search found: it is sent nothing any more.

\b
Examples:
  router models retire llama-4-maverick
"""
UNDO_HELP = """
Set the last change of a model back that a search found: promoted, retired or taken on.

Without MODEL all is set back that the last search, or the one of that number, took on. Roster, places,
discovered.yaml and the Variable are then what they were before.

\b
Examples:
  router models undo llama-4-maverick
  router models undo
  router models undo --search 12
"""

OptionalText = Optional[str]  # noqa: UP045 - typer evaluates it at run time, also on 3.10
Model = Annotated[str, typer.Argument(metavar="MODEL", help="Its name on the roster.")]


def search(
    *,
    category: Annotated[
        Optional[list[str]],  # noqa: UP045 - as above
        typer.Option(help="Only for this category; repeatable."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show who would be tried; send nothing, keep nothing.")
    ] = False,
    by: terminal.By = None,
    as_json: terminal.Json = False,
    config: terminal.Config = terminal.DEFAULT_CONFIG,
    airflow: terminal.AirflowUrl = None,
    airflow_user: terminal.AirflowUser = None,
    airflow_password: terminal.AirflowPassword = None,
) -> None:
    # Not at the top: it takes a second, and every other verb would wait for it.
    from router.discovery import run_search  # noqa: PLC0415
    from router.settings import load_discovery  # noqa: PLC0415 - the same

    settings = load_config(config)
    learning = load_learning(config, settings.categories)
    looking_for = load_discovery(config, settings.categories)
    addresses = addresses_from_environment()
    with terminal.database(addresses.database_url):
        pass  # says so if the schema is not there
    if not dry_run and not as_json:
        terminal.note("Candidates are tried; that can take many minutes.")
    report = run_search(
        addresses, settings, learning, looking_for, config, categories=category, by=terminal.who(by),
        dry_run=dry_run, variables=terminal.airflow(airflow, airflow_user, airflow_password),
    )  # fmt: skip
    if as_json:
        terminal.print_json(_plain(report))
    else:
        _show(report)


def _plain(report: SearchReport) -> dict[str, Any]:
    return {
        "search": report.search,
        "plans": [
            {
                "category": plan.category,
                "incumbent": plan.incumbent and plan.incumbent.name,
                "judge": plan.judge and plan.judge.name,
                "prompts": len(plan.prompts),
                "passing": plan.passing,
                "candidates": [model.name for model in plan.candidates],
            }
            for plan in report.plans
        ],
        "findings": report.findings,
        "notes": report.notes,
    }


def _show(report: SearchReport) -> None:
    for note in report.notes:
        terminal.note(note)
    for plan in report.plans:
        names = ", ".join(model.name for model in plan.candidates) or "nobody"
        against = f" against {plan.incumbent.name}" if plan.incumbent and plan.candidates else ""
        tried = "would be tried" if report.search is None else "tried"
        typer.echo(f"{plan.category}: {len(plan.passing)} meet the criteria; {tried}: {names}{against}")
    found = [finding for finding in report.findings if finding.verdict in SHOWN]
    table = terminal.quiet_table("model", "category", "verdict", "why")
    for finding in found:
        verdict = Text(finding.verdict, style="green" if finding.verdict == "taken" else "dim")
        table.add_row(finding.model, finding.category or "", verdict, finding.reason)
    if found:
        terminal.out().print(table)
    others = Counter(finding.verdict for finding in report.findings)
    typer.echo(f"refused: {others['refused']}, known already: {others['known']} (--json says why)")


def promote(
    model: Model,
    *,
    by: terminal.By = None,
    as_json: terminal.Json = False,
    database: terminal.Database = None,
    config: terminal.Config = terminal.DEFAULT_CONFIG,
    airflow: terminal.AirflowUrl = None,
    airflow_user: terminal.AirflowUser = None,
    airflow_password: terminal.AirflowPassword = None,
) -> None:
    from router.discovery import promote as promote_now  # noqa: PLC0415 - as in search

    variables = terminal.airflow(airflow, airflow_user, airflow_password)
    url = terminal.database_url(database)
    done = promote_now(url, config, model, by=terminal.who(by), variables=variables)
    words = "promoted; it is ranked as any other from the next review on, and its target is as it was"
    _say(done, words, as_json=as_json)


def retire(
    model: Model,
    *,
    by: terminal.By = None,
    as_json: terminal.Json = False,
    database: terminal.Database = None,
    config: terminal.Config = terminal.DEFAULT_CONFIG,
    airflow: terminal.AirflowUrl = None,
    airflow_user: terminal.AirflowUser = None,
    airflow_password: terminal.AirflowPassword = None,
) -> None:
    from router.discovery import retire as retire_now  # noqa: PLC0415 - as in search

    variables = terminal.airflow(airflow, airflow_user, airflow_password)
    url = terminal.database_url(database)
    done = retire_now(url, config, model, by=terminal.who(by), variables=variables)
    _say(done, "retired; it is sent nothing any more", as_json=as_json)


def _say(done: Decision, words: str, *, as_json: bool) -> None:
    for note in done.notes:
        terminal.note(note)
    if as_json:
        terminal.print_json(done)
    else:
        typer.echo(f"{done.model}: {words}.")


def undo(
    model: Annotated[OptionalText, typer.Argument(metavar="MODEL", help="Its name on the roster.")] = None,
    *,
    number: Annotated[
        Optional[int],  # noqa: UP045 - as above
        typer.Option("--search", metavar="NUMBER", help="All that this search took on."),
    ] = None,
    by: terminal.By = None,
    as_json: terminal.Json = False,
    database: terminal.Database = None,
    config: terminal.Config = terminal.DEFAULT_CONFIG,
    airflow: terminal.AirflowUrl = None,
    airflow_user: terminal.AirflowUser = None,
    airflow_password: terminal.AirflowPassword = None,
) -> None:
    from router.discovery import undo_search  # noqa: PLC0415 - as in search

    if model is not None and number is not None:
        raise typer.BadParameter("either MODEL or --search")
    variables = terminal.airflow(airflow, airflow_user, airflow_password)
    undone = undo_search(
        terminal.database_url(database), config, model=model, search=number, by=terminal.who(by),
        variables=variables,
    )  # fmt: skip
    for note in undone[0].notes:
        terminal.note(note)
    if as_json:
        terminal.print_json(undone)
    for one in () if as_json else undone:
        typer.echo(f"{one.model}: {one.what} is set back; workers hear of it within a second.")
