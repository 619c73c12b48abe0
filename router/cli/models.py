"""The verbs `router traffic` and `router models`: what each model may be sent, and which models there are."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from rich.text import Text

from router.cli import terminal
from router.database import Connection, rows
from router.errors import AirflowError, ConfigError, RouterError, first_line
from router.models import AirflowApi, sync_roster
from router.settings import load_config, read_discovered
from router.status import ModelStatus, Status, read_status
from router.traffic import GRAMMAR, TrafficTarget

VARIABLE_PREFIX = "traffic."
PATIENCE_SECONDS = 3.0
MOST_SHOWN = 120  # characters of a name that somebody mistyped

OptionalText = Optional[str]  # noqa: UP045 - typer evaluates it at run time, also on 3.10

TRAFFIC_HELP = f"""
Show what each model may be sent, or set it.

A target is set by the Airflow Variable traffic.MODEL. The line is checked first, and when it is set, waited
for until it is in force, mostly less than a second.

\b
{GRAMMAR}

\b
Examples:
  router traffic
  router traffic llama-3.3-70b
  router traffic llama-3.3-70b 120/min, 4/s, 20 at once
  router traffic llama-3.3-70b 0
"""
MODELS_HELP = """
Show the roster of models; carry it over from the config; search for better ones.

Each model has its state, its place in each category (1 is asked first), and its trouble if there is one. Of
models that a search found the last change is told, too, and what the last search made of its candidates.

\b
Examples:
  router models
  router models --json
  router models sync
  router models search --dry-run
  router models undo
"""
SYNC_HELP = """
Carry config/models.yaml over to the roster, which workers read at once.

Models that the file does not name any more are paused.
"""


@dataclass(frozen=True, slots=True)
class ModelTarget:
    """One model's target, since when, what the Variable says (None: unknown or gone), what is wrong."""

    model: str
    target: str | None
    in_force: bool
    since: datetime | None
    variable: str | None
    trouble: str | None
    warnings: tuple[str, ...]


def traffic(
    model: Annotated[OptionalText, typer.Argument(metavar="MODEL", help="Default: all models.")] = None,
    target: Annotated[
        Optional[list[str]],  # noqa: UP045 - as above
        typer.Argument(metavar="TARGET", help="What the model may be sent from now on; see above."),
    ] = None,
    *,
    as_json: terminal.Json = False,
    database: terminal.Database = None,
    redis: terminal.Redis = None,
    airflow: terminal.AirflowUrl = None,
    airflow_user: terminal.AirflowUser = None,
    airflow_password: terminal.AirflowPassword = None,
) -> None:
    line = " ".join(target or []).strip()
    wanted = TrafficTarget.parse(line) if target else None
    with terminal.database(database) as connection:
        now = read_status(connection, redis)
    if model is not None:
        terminal.known(model, [known.model for known in now.models], "model")
    api = terminal.airflow(airflow, airflow_user, airflow_password)
    if wanted is None or model is None:
        _show(now, model, api, as_json=as_json)
        return
    if api is None:
        raise ConfigError(
            "ROUTER_AIRFLOW_URL is not set, and a target is set by an Airflow Variable. Set it, with"
            " ROUTER_AIRFLOW_USER and ROUTER_AIRFLOW_PASSWORD, or edit the Variable in Airflow's page."
        )
    with api:
        api.set_variable(VARIABLE_PREFIX + model, line)
    _await(model, wanted, redis, now, as_json=as_json)


def _await(model: str, wanted: TrafficTarget, redis: str | None, now: Status, *, as_json: bool) -> None:
    for warning in wanted.warnings:
        terminal.note(warning)
    seconds = None
    if redis:
        from router.limiter import seconds_until_applied  # noqa: PLC0415 - it takes half a second

        seconds = seconds_until_applied(redis, model, str(wanted), timeout_seconds=PATIENCE_SECONDS)
    if seconds is None and redis and now.workers and not now.held:
        raise RouterError(
            f"The Variable is set, but {model} does not work by it after {PATIENCE_SECONDS:g} s."
            " See `router traffic` for its trouble, and the triggerer's log."
        )
    if as_json:
        done = {"model": model, "target": str(wanted), "in_force": seconds is not None, "seconds": seconds}
        terminal.print_json(done)
    elif seconds is not None:
        typer.echo(f"{model}: {wanted}, in force after {seconds:.1f} s")
    else:
        why = "no worker is alive" if redis else "ROUTER_REDIS_URL is not set, so it cannot be seen"
        typer.echo(f"{model}: {wanted}, set; in force as soon as a worker reads it ({why})")


def _show(now: Status, model: str | None, api: AirflowApi | None, *, as_json: bool) -> None:
    variables, problem = _variables(api)
    targets = [
        _target(known, None if variables is None else variables.get(VARIABLE_PREFIX + known.model))
        for known in now.models
        if model in (None, known.model)
    ]
    if as_json:
        terminal.print_json({entry.model: entry for entry in targets})
        return
    for note in (*now.notes, *problem, *_strangers(now, variables or {})):
        terminal.note(note)
    table = terminal.quiet_table("model", "target in force", "for", "Variable")
    for entry in targets:
        table.add_row(entry.model, _in_force(entry), terminal.ago(entry.since), _variable(entry, variables))
    terminal.out().print(table)
    for entry in targets:
        if entry.trouble:
            terminal.out().print(Text(f"\n{entry.model}: {entry.trouble}", style="red"))
        for warning in entry.warnings:
            terminal.out().print(Text(f"\n{entry.model}: {warning}", style="yellow"))


def _variables(api: AirflowApi | None) -> tuple[dict[str, str] | None, list[str]]:
    if api is None:
        return None, []
    try:
        with api:
            return api.variables(VARIABLE_PREFIX), []
    except AirflowError as error:
        return None, [f"What the Variables say is not known. {first_line(str(error))}"]


def _strangers(now: Status, variables: dict[str, str]) -> list[str]:
    """A sentence for each Variable that is meant for a model which is not there."""
    known = {VARIABLE_PREFIX + model.model for model in now.models}
    return [
        f"The Variable {key[:MOST_SHOWN]!r} names no model in use; it changes nothing."
        for key in sorted(variables)
        if key.startswith(VARIABLE_PREFIX) and key not in known
    ]


def _target(model: ModelStatus, variable: str | None) -> ModelTarget:
    in_force = model.target is not None and not model.target_kept
    return ModelTarget(
        model.model, model.target, in_force, model.target_since, variable, model.trouble, model.warnings
    )


def _in_force(entry: ModelTarget) -> Text:
    if entry.target is None:
        return Text("none yet", style="yellow")
    return Text(entry.target, style="" if entry.in_force else "dim")


def _variable(entry: ModelTarget, variables: dict[str, str] | None) -> Text:
    """The Variable's line where it differs from what is in force."""
    if variables is None:
        return Text("unknown", style="dim")
    if entry.variable is None:
        return Text("none: the last target stays", style="yellow")
    try:
        same = str(TrafficTarget.parse(entry.variable)) == entry.target
    except ConfigError:
        same = False
    return Text("the same", style="dim") if same else Text(entry.variable[:60], style="yellow")


models = terminal.verbs(help=MODELS_HELP, invoke_without_command=True)


@models.callback(help=MODELS_HELP)
def _models(
    context: typer.Context,
    *,
    as_json: terminal.Json = False,
    database: terminal.Database = None,
    config: terminal.Config = terminal.DEFAULT_CONFIG,
) -> None:
    if context.invoked_subcommand is not None:
        return
    with terminal.database(database) as connection:
        found = _roster(connection)
        tried = [] if as_json else _last_tried(connection)
    _, problem = read_discovered(config)
    if problem is not None:
        terminal.note(problem)
    if as_json:
        terminal.print_json({row["model"]: row for row in found})
        return
    categories = sorted({category for row in found for category in row["places"]})
    table = terminal.quiet_table(
        "model", "state", *categories, "max tokens", "trouble", right=(*categories, "max tokens")
    )
    for row in found:
        places = [str(row["places"].get(category, "-")) for category in categories]
        state = Text(row["state"], style="" if row["state"] == "active" else "dim")
        trouble = Text(row["trouble"] or "", style="red")
        table.add_row(row["model"], state, *places, f"{row['max_tokens']:,}", trouble)
    terminal.out().print(table)
    for row in found:
        if row["why"]:
            terminal.out().print(Text(f"\n{row['model']}: {row['why']}", style="dim"))
    for row in tried:
        said = f"\n{row['model']} for {row['category']}: {row['verdict']}, {row['reason']}"
        terminal.out().print(Text(said, style="dim"))


def _last_tried(connection: Connection) -> list[dict[str, Any]]:
    """What the last search made of those candidates that are not on the roster."""
    return rows(
        connection,
        "SELECT model, category, verdict, reason FROM candidates WHERE verdict IN ('lost', 'unreachable')"
        " AND search = (SELECT max(search) FROM searches) AND model NOT IN (SELECT model FROM roster)"
        " ORDER BY category, verdict, model LIMIT 20",
    )


def _roster(connection: Connection) -> list[dict[str, Any]]:
    return rows(
        connection,
        "SELECT r.model, r.state, r.source, r.endpoint, r.context_tokens, r.max_tokens, r.timeout_seconds,"
        " r.default_target, r.trouble, coalesce((SELECT jsonb_object_agg(k.category, k.place) FROM rankings k"
        " WHERE k.model = r.model), '{}') AS places, (SELECT format('%%s %%s by %%s: %%s', e.what,"
        " to_char(e.at, 'YYYY-MM-DD'), e.by, e.why) FROM roster_events e WHERE r.source = 'search'"
        " AND e.event = last_roster_event(r.model)) AS why FROM roster r ORDER BY r.state, r.model",
    )


@models.command(help=SYNC_HELP)
def sync(
    *,
    as_json: terminal.Json = False,
    database: terminal.Database = None,
    config: terminal.Config = terminal.DEFAULT_CONFIG,
) -> None:
    settings = load_config(Path(config))
    if settings.discovered_problem is not None:
        terminal.note(settings.discovered_problem)
    for name, model in settings.models.items():
        for warning in TrafficTarget.parse(model.target).warnings:
            terminal.note(f"{name}: {warning}")
    with terminal.database(database) as connection:
        before = {row["model"]: row for row in _roster(connection)}
        sync_roster(connection, settings)
        after = {row["model"]: row for row in _roster(connection)}
    added = sorted(after.keys() - before.keys())
    changed = sorted(name for name in before if before[name] != after.get(name))
    if as_json:
        terminal.print_json({"added": added, "changed": changed, "models": len(after)})
    else:
        parts = [
            f"{len(after)} models",
            f"added: {', '.join(added) or 'none'}",
            f"changed: {', '.join(changed) or 'none'}",
        ]
        typer.echo("; ".join(parts))
