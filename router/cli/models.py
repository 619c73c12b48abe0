"""`router traffic` and `router models`: traffic targets and the roster of models."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from router.cli import terminal
from router.database import Connection, rows
from router.errors import (
    AirflowError,
    ConfigError,
    InputError,
    RouterError,
    TrafficTargetError,
    first_line,
)
from router.migrations import recount_if_due, schema_problem
from router.models import MASK, VARIABLE_PREFIX, AirflowApi, sync_roster
from router.settings import load_config, load_discovery, read_discovered
from router.status import ModelStatus, Status, read_status
from router.traffic import GRAMMAR, TrafficTarget

APPLY_TIMEOUT_SECONDS = 3.0
MAX_NAME_CHARACTERS = 120
MAX_REJECTED = 20  # candidates of the last search
REJECTED = {"lost": "not admitted", "unreachable": "unreachable"}  # by verdict

TRAFFIC_HELP = f"""
Show or set traffic targets.

The target of a model is stored in the Airflow Variable traffic.MODEL. Without TARGET the command shows the
active targets. With TARGET it validates the line, sets the Variable and waits until the target is active.

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
Show and manage the roster of models.

Lists each model's state, its rank in each category (1 is preferred), and its last error. Models found by a
search are listed with their last change, and candidates that the last search rejected with the reason.

\b
Examples:
  router models
  router models --json
  router models sync
  router models search --dry-run
  router models undo
"""
SYNC_HELP = """
Apply config/models.yaml to the roster.

Models that are no longer in the file are paused. Workers pick up the change immediately. The database schema
is not changed: see `router migrate`, which also syncs the models.
"""


@dataclass(frozen=True, slots=True)
class ModelTarget:
    """Target of one model. `variable` is the line of the Airflow Variable; None if unknown or deleted.

    source: where the Variable is set, if it is not in Airflow's database.
    """

    model: str
    target: str | None
    in_force: bool
    since: datetime | None
    variable: str | None
    trouble: str | None
    warnings: tuple[str, ...]
    source: str | None = None


def traffic(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="Name of a model. Default: all.")
    ] = None,
    target: Annotated[list[str] | None, typer.Argument(metavar="TARGET", help="New traffic target.")] = None,
    *,
    as_json: terminal.Json = False,
    database: terminal.Database = None,
    redis: terminal.Redis = None,
    airflow: terminal.AirflowUrl = None,
    airflow_user: terminal.AirflowUser = None,
    airflow_password: terminal.AirflowPassword = None,
) -> None:
    line = " ".join(target or []).strip()
    new_target = _parsed(line) if target else None
    with terminal.database(database) as connection:
        now = read_status(connection, redis)
    if model is not None:
        terminal.known(model, [known.model for known in now.models], "model")
    api = terminal.airflow(airflow, airflow_user, airflow_password)
    if new_target is None or model is None:
        _print_targets(now, model, api, as_json=as_json)
        return
    if api is None:
        raise ConfigError(
            "ROUTER_AIRFLOW_URL is not set, which is needed to edit an Airflow Variable. Set it together with"
            " ROUTER_AIRFLOW_USER and ROUTER_AIRFLOW_PASSWORD, or edit the Variable in Airflow."
        )
    source = next(known.target_source for known in now.models if known.model == model)
    if source is not None:
        place, _, _ = source.partition(";")
        raise ConfigError(f"The target of {model} comes from the {place}. Change it there.")
    with api:
        api.set_variable(VARIABLE_PREFIX + model, line)
    before = next(known.target for known in now.models if known.model == model)
    terminal.audit(database, "traffic", model, before=before, after=str(new_target))
    _wait_until_active(model, new_target, redis, now, as_json=as_json)


def _parsed(line: str) -> TrafficTarget:
    """Parses a target; an error refers to the help instead of showing the grammar."""
    try:
        return TrafficTarget.parse(line)
    except TrafficTargetError as error:
        raise InputError(f"{first_line(error)} See `router traffic --help`.") from error


def _wait_until_active(
    model: str, new_target: TrafficTarget, redis: str | None, now: Status, *, as_json: bool
) -> None:
    for warning in new_target.warnings:
        terminal.note(warning)
    seconds = None
    if redis:
        from router.limiter import seconds_until_applied  # noqa: PLC0415 - takes half a second

        seconds = seconds_until_applied(redis, model, str(new_target), timeout_seconds=APPLY_TIMEOUT_SECONDS)
    if seconds is None and redis and now.workers and not now.held:
        raise RouterError(
            f"The Variable of {model} was set, but the target is not active after"
            f" {APPLY_TIMEOUT_SECONDS:g} s. Check `router traffic` and the log of the triggerer."
        )
    if as_json:
        active = seconds is not None
        terminal.print_json(
            {"model": model, "target": str(new_target), "in_force": active, "seconds": seconds}
        )
    elif seconds is not None:
        typer.echo(f"{model}: {new_target}, active after {seconds:.1f} s")
    else:
        reason = "no worker is running" if redis else "unverified, because ROUTER_REDIS_URL is not set"
        typer.echo(f"{model}: {new_target}, set; applies when a worker reads it ({reason})")


def _print_targets(now: Status, model: str | None, api: AirflowApi | None, *, as_json: bool) -> None:
    variables, problem = _variables(api)
    targets = [
        _target(known, None if variables is None else variables.get(VARIABLE_PREFIX + known.model))
        for known in now.models
        if model in (None, known.model)
    ]
    if as_json:
        terminal.print_json({entry.model: entry for entry in targets})
        return
    for note in (*now.notes, *problem, *_unused_variables(now, variables or {})):
        terminal.note(note)
    table = terminal.quiet_table("model", "active target", "for", "Variable")
    for entry in targets:
        table.add_row(
            entry.model, _active_target(entry), terminal.ago(entry.since), _variable(entry, variables)
        )
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
        return None, [f"The Variables could not be read. {first_line(str(error))}"]


def _unused_variables(now: Status, variables: dict[str, str]) -> list[str]:
    """Returns a note for each Variable whose model is not in use."""
    known = {VARIABLE_PREFIX + model.model for model in now.models}
    return [
        f"The Variable {key[:MAX_NAME_CHARACTERS]!r} has no effect: the model is not in use."
        for key in sorted(variables)
        if key.startswith(VARIABLE_PREFIX) and key not in known
    ]


def _target(model: ModelStatus, variable: str | None) -> ModelTarget:
    in_force = model.target is not None and not model.target_kept
    return ModelTarget(
        model.model, model.target, in_force, model.target_since, variable, model.trouble, model.warnings,
        model.target_source,
    )  # fmt: skip


def _active_target(entry: ModelTarget) -> Text:
    if entry.target is None:
        return Text("none", style="yellow")
    return Text(entry.target, style="" if entry.in_force else "dim")


def _variable(entry: ModelTarget, variables: dict[str, str] | None) -> Text:
    """Renders the line of the Variable where it differs from the active target, or its other source."""
    if entry.source is not None:
        return Text(f"from the {entry.source}", style="cyan")
    if variables is None:
        return Text("unknown", style="dim")
    if entry.variable is None:
        return Text("deleted: the last target stays active", style="yellow")
    if entry.variable == MASK:
        return Text("masked by Airflow", style="dim")
    try:
        same = str(TrafficTarget.parse(entry.variable)) == entry.target
    except ConfigError:
        same = False
    return Text("same", style="dim") if same else Text(entry.variable[:60], style="yellow")


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
        roster = _roster(connection)
        rejected = [] if as_json else _last_rejected(connection)
        probation = [] if as_json else _probation(connection, config)
    _, problem = read_discovered(config)
    if problem is not None:
        terminal.note(problem)
    if as_json:
        terminal.print_json({row["model"]: row for row in roster})
        return
    categories = sorted({category for row in roster for category in row["places"]})
    table = terminal.quiet_table(
        "model", "state", *categories, "max tokens", "last error", right=(*categories, "max tokens")
    )
    for row in roster:
        places = [str(row["places"].get(category, "-")) for category in categories]
        state = Text(row["state"], style="" if row["state"] == "active" else "dim")
        last_error = Text(row["trouble"] or "", style="red")
        table.add_row(row["model"], state, *places, f"{row['max_tokens']:,}", last_error)
    terminal.out().print(table)
    for row in roster:
        if row["why"]:
            terminal.out().print(Text(f"\n{row['model']}: {row['why']}", style="dim"))
    for line in (*probation, *rejected):
        terminal.out().print(Text(f"\n{line}", style="dim"))


def _probation(connection: Connection, config: Path) -> list[str]:
    """Returns a line for each model on probation: its target, and its calls as of the last review."""
    found = rows(
        connection,
        "SELECT model, target, string_agg(format('%%s %%s', calls, category), ', ') AS calls"
        " FROM console_probation(100) GROUP BY model, target ORDER BY model",
    )
    if not found:
        return []
    needed = load_discovery(config, load_config(config).categories).probation.min_calls
    return [
        f"{row['model']} on probation: initial target {row['target']}, calls as of the last review:"
        f" {row['calls']}; needed in one category: {needed} (router models review)"
        for row in found
    ]


def _last_rejected(connection: Connection) -> list[str]:
    """Returns lines on the candidates of the last search that it did not admit; unserved ones are counted."""
    found = rows(
        connection,
        "SELECT model, category, verdict, reason, trial IS NOT NULL AS tried FROM candidates"
        " WHERE verdict IN ('lost', 'unreachable') AND search = (SELECT max(search) FROM searches)"
        " AND model NOT IN (SELECT model FROM roster) ORDER BY category, verdict, model LIMIT 1000",
    )
    unserved = {row["model"] for row in found if row["verdict"] == "unreachable" and not row["tried"]}
    lines = [
        f"{row['model']} for {row['category']}: {REJECTED[row['verdict']]}, {row['reason']}"
        for row in found
        if row["model"] not in unserved
    ][:MAX_REJECTED]
    if unserved:
        lines.append(f"{len(unserved)} candidates of the last search: not served by the Models Backend")
    return lines


def _roster(connection: Connection) -> list[dict[str, Any]]:
    return rows(
        connection,
        "SELECT r.model, r.state, r.source, r.endpoint, r.context_tokens, r.max_tokens, r.timeout_seconds,"
        " r.default_target, r.trouble, coalesce((SELECT jsonb_object_agg(k.category, k.place) FROM rankings k"
        " WHERE k.model = r.model), '{}') AS places, (SELECT format('%%s %%s by %%s: %%s',"
        " CASE e.what WHEN 'taken' THEN 'admitted' ELSE e.what END,"
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
        connection.commit()
        recount_if_due(connection)
        problem = schema_problem(connection)
    if problem is not None:
        terminal.note(str(problem))
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
