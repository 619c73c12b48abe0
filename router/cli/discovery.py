"""The commands `router models search`, `promote`, `retire` and `undo`."""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from router.cli import terminal
from router.cli.search_display import show_report, shown_progress
from router.settings import addresses_from_environment, load_config, load_learning

if TYPE_CHECKING:
    from router.discovery import Decision, SearchReport
    from router.models import AirflowApi

STEPS = {"promote": "promoted", "retire": "retired", "stay": "stays on probation"}  # of decisions
CHANGES = {"taken": "admission", "promoted": "promotion", "retired": "retirement"}  # of stored changes

SEARCH_HELP = """
Search for better models now.

Reads the catalogs, tries the models that meet the criteria, and admits winners. A candidate answers the same
prompts as the first model of the category, through the Models Backend and the limiter. If it is significantly
better, it is admitted on probation, with a small target of its own. Takes about a minute, longer under load;
the progress is shown. Only one search runs at a time. Requires ROUTER_DATABASE_URL, ROUTER_REDIS_URL and
MODELS_BACKEND_URL.

\b
Examples:
  router models search --dry-run           show what would be tried
  router models search --category creative
  router models search --json

\b
Keys of --json:
  search    null for a dry run
  plans     category, incumbent, judge, judges, prompts, passing, candidates
  findings  model, category, catalogue, verdict, reason, trial
  notes
"""
REVIEW_PROBATION_HELP = """
Decide on the models on probation now.

Grades and sums up the calls so far, and compares each model on probation with the median model of its
categories. It is promoted, retired, or stays on probation, and the reason is shown. The nightly review does
the same. With --dry-run, only the evidence of earlier reviews counts.

\b
Examples:
  router models review --dry-run
  router models review
"""
PROMOTE_HELP = """
Promote a model on probation: it is ranked like any other model.

\b
Examples:
  router models promote llama-4-maverick
"""
RETIRE_HELP = """
Retire a discovered model: it gets no more prompts.

\b
Examples:
  router models retire llama-4-maverick
"""
UNDO_HELP = """
Undo the last change to a discovered model.

A change is an admission, a promotion or a retirement. Without MODEL, undo everything that the last search, or
the one given by --search, admitted. Roster, ranks, discovered.yaml and the Variable are restored.

\b
Examples:
  router models undo llama-4-maverick
  router models undo
  router models undo --search 12
"""

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Name of the model on the roster.")]


@dataclass(frozen=True)
class _Options:
    """The options that all four commands share."""

    by: terminal.By = None
    as_json: terminal.Json = False
    config: terminal.Config = terminal.DEFAULT_CONFIG
    airflow: terminal.AirflowUrl = None
    airflow_user: terminal.AirflowUser = None
    airflow_password: terminal.AirflowPassword = None

    @property
    def author(self) -> str:
        return terminal.who(self.by)

    @property
    def variables(self) -> AirflowApi | None:
        return terminal.airflow(self.airflow, self.airflow_user, self.airflow_password)


def _with_options(command: Callable[..., None]) -> Callable[..., None]:
    """Declares the shared options on a command, which gets them as `options`."""
    hints = typing.get_type_hints(command, include_extras=True, localns={"_Options": _Options})
    own = [
        parameter.replace(annotation=hints[name])
        for name, parameter in inspect.signature(command).parameters.items()
        if name != "options"
    ]
    shared_hints = typing.get_type_hints(_Options, include_extras=True)
    shared = [
        parameter.replace(annotation=shared_hints[name], kind=inspect.Parameter.KEYWORD_ONLY)
        for name, parameter in inspect.signature(_Options).parameters.items()
    ]

    @functools.wraps(command)
    def run(**values: Any) -> None:
        options = _Options(**{parameter.name: values.pop(parameter.name) for parameter in shared})
        command(**values, options=options)

    parameters = sorted([*own, *shared], key=lambda parameter: parameter.kind)
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # read by typer
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


@_with_options
def search(
    *,
    category: Annotated[
        list[str] | None, typer.Option(metavar="CATEGORY", help="Search only for this category; repeatable.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be tried; send and store nothing.")
    ] = False,
    options: _Options,
) -> None:
    # Imported here, since it takes a second, which every other command would wait for.
    from router.discovery import SearchProgress, run_search  # noqa: PLC0415
    from router.settings import load_discovery  # noqa: PLC0415 - the same

    config = load_config(options.config)
    learning = load_learning(options.config, config.categories)
    settings = load_discovery(options.config, config.categories)
    addresses = addresses_from_environment()
    with terminal.database(addresses.database_url):
        pass  # checks the schema
    progress = SearchProgress()
    with nullcontext() if options.as_json else shown_progress(progress):
        report = run_search(
            addresses, config, learning, settings, options.config, categories=category, by=options.author,
            dry_run=dry_run, variables=options.variables, progress=progress,
        )  # fmt: skip
    if options.as_json:
        terminal.print_json(_report_json(report))
    else:
        show_report(report, options.config)


def _report_json(report: SearchReport) -> dict[str, Any]:
    return {
        "search": report.search,
        "plans": [
            {
                "category": plan.category,
                "incumbent": plan.incumbent and plan.incumbent.name,
                "judge": plan.judges[0].name if plan.judges else None,
                "judges": [judge.name for judge in plan.judges],
                "prompts": len(plan.prompts),
                "passing": plan.passing,
                "candidates": [model.name for model in plan.candidates],
            }
            for plan in report.plans
        ],
        "findings": report.findings,
        "notes": report.notes,
    }


@_with_options
def review_models(
    *,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the decisions; store nothing.")] = False,
    database: terminal.Database = None,
    options: _Options,
) -> None:
    from router.discovery import review_probation  # noqa: PLC0415 - as in search
    from router.learning import grade_answers, sum_evidence  # noqa: PLC0415 - the same
    from router.settings import load_discovery  # noqa: PLC0415 - the same

    url = terminal.database_url(database)
    config = load_config(options.config)
    learning = load_learning(options.config, config.categories)
    with terminal.database(url):
        pass  # checks the schema
    if not dry_run:
        grade_answers(url, learning)
        sum_evidence(url, learning)
    decisions = review_probation(
        url, options.config, config, learning, load_discovery(options.config, config.categories),
        by=options.author, variables=options.variables, dry_run=dry_run,
    )  # fmt: skip
    if options.as_json:
        terminal.print_json(decisions)
        return
    for note in dict.fromkeys(note for decision in decisions for note in decision.notes):
        terminal.note(note)
    for decision in decisions:
        typer.echo(f"{decision.model}: {STEPS[decision.step.value]}: {decision.reason}")
    if not decisions:
        typer.echo("No model is on probation.")


@_with_options
def promote(model: Model, *, database: terminal.Database = None, options: _Options) -> None:
    from router.discovery import promote as promote_model  # noqa: PLC0415 - as in search

    url = terminal.database_url(database)
    decision = promote_model(url, options.config, model, by=options.author, variables=options.variables)
    _report(decision, "promoted; the next review ranks it, its target is unchanged", options)


@_with_options
def retire(model: Model, *, database: terminal.Database = None, options: _Options) -> None:
    from router.discovery import retire as retire_model  # noqa: PLC0415 - as in search

    url = terminal.database_url(database)
    decision = retire_model(url, options.config, model, by=options.author, variables=options.variables)
    _report(decision, "retired; it gets no more prompts", options)


def _report(decision: Decision, text: str, options: _Options) -> None:
    for note in decision.notes:
        terminal.note(note)
    if options.as_json:
        terminal.print_json(decision)
    else:
        typer.echo(f"{decision.model}: {text}.")


@_with_options
def undo(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="Name of the model on the roster.")
    ] = None,
    *,
    number: Annotated[
        int | None,
        typer.Option("--search", metavar="NUMBER", help="Undo everything that this search admitted."),
    ] = None,
    database: terminal.Database = None,
    options: _Options,
) -> None:
    from router.discovery import undo_search  # noqa: PLC0415 - as in search

    if model is not None and number is not None:
        raise typer.BadParameter("give either MODEL or --search")
    undone = undo_search(
        terminal.database_url(database), options.config, model=model, search=number, by=options.author,
        variables=options.variables,
    )  # fmt: skip
    for note in undone[0].notes:
        terminal.note(note)
    if options.as_json:
        terminal.print_json(undone)
        return
    for one in undone:
        typer.echo(
            f"{one.model}: {CHANGES.get(one.what, one.what)} undone; workers apply it within a second."
        )
