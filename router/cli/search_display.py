"""Progress and report of `router models search`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Group
from rich.live import Live
from rich.text import Text

from router.cli import terminal

if TYPE_CHECKING:
    from router.discovery import CategoryPlan, SearchProgress, SearchReport

REFRESHES_PER_SECOND = 4
SHOWN = ("taken", "lost", "unreachable")
STYLES = {"taken": "green", "admitted": "green"}


@contextmanager
def shown_progress(progress: SearchProgress) -> Iterator[None]:
    """Shows the progress of a search on standard error: a live table on a terminal, else plain lines."""
    console = terminal.err()

    def print_line(line: str) -> None:
        console.print(f"{progress.seconds:5.1f} s  {line}")

    progress.log = print_line
    if not console.is_terminal:
        yield
        return
    progress.has_summaries = False  # the table shows them
    with Live(
        get_renderable=lambda: _trials(progress), console=console, transient=True,
        refresh_per_second=REFRESHES_PER_SECOND,
    ):  # fmt: skip
        yield


def _trials(progress: SearchProgress) -> Group:
    table = terminal.quiet_table("model", "category", "calls", "failed", "judged", right=("failed", "judged"))
    table.add_column("verdict")
    for trial in list(progress.trials.values()):
        calls = "stopped" if trial.stopped else f"{trial.calls}/{trial.of}"
        failed, judged = trial.calls - trial.answered, trial.judged or ""
        note = trial.verdict or ("(incumbent)" if trial.role == "incumbent" else "")
        style = STYLES.get(trial.verdict or "", "dim" if trial.is_over else "")
        table.add_row(trial.model, trial.category, calls, str(failed or ""), str(judged), note, style=style)
    return Group(Text(f"{progress.stage}, {progress.seconds:.0f} s", style="bold"), table)


def show_report(report: SearchReport, folder: Path) -> None:
    """Prints the verdicts, and the entries of `discovered.yaml` that the search added."""
    from router.discovery import LABELS, entry_text, is_unserved  # noqa: PLC0415 - takes a second

    out = terminal.out()
    for note in report.notes:
        terminal.note(note)
    for plan in report.plans:
        out.print(_plan_line(report, plan))
    found = [f for f in report.findings if f.verdict in SHOWN and not is_unserved(f)]
    table = terminal.quiet_table("model", "category", "verdict", "reason")
    for finding in found:
        verdict = Text(LABELS[finding.verdict], style=STYLES.get(finding.verdict, "dim"))
        table.add_row(finding.model, finding.category or "", verdict, finding.reason)
    if found:
        out.print(table)
    counts = Counter("unserved" if is_unserved(f) else f.verdict for f in report.findings)
    others = f"{counts['unserved']} not served, {counts['refused']} refused, {counts['known']} known"
    out.print(f"Not tried: {others} (models by category; --json shows the reasons).", style="dim")
    for finding in report.admitted:
        typer.echo(f"\nAppended to {folder / 'discovered.yaml'}:\n{entry_text(folder, finding.model)}")
    if report.admitted:
        names = ", ".join(dict.fromkeys(finding.model for finding in report.admitted))
        out.print(
            f"{names}: on probation. See `router models`. `router models review` decides by its evidence,"
            " `router models undo` restores everything."
        )


def _plan_line(report: SearchReport, plan: CategoryPlan) -> str:
    names = ", ".join(model.name for model in plan.candidates) or "none"
    against = f" against {plan.incumbent.name}" if plan.incumbent and plan.candidates else ""
    tried = "to try" if report.search is None else "tried"
    unserved = sum(finding.category == plan.category for finding in report.unserved)
    return (
        f"{plan.category}: {len(plan.passing)} meet the criteria, {unserved} of them not served; "
        f"{tried}: {names}{against}"
    )
