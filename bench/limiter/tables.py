"""Tables, goals and plot of a result."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from bench.limiter.clients import BURST, CLIENT, PACED, SLACK, THREE


class Aim(NamedTuple):
    """A goal, and the measured value `seen`."""

    what: str
    aim: float
    seen: float
    reached: bool


def aims_of(result: dict[str, Any]) -> list[Aim]:
    """Compares the result with the goals."""
    free = result["waiters"]["free"][BURST]
    binding = result["waiters"]["binding"][BURST]
    door, memory = result["door"], result["bytes"][BURST]
    at_once, delayed = door["at_once"], door["delayed"]
    ours = [at_once[PACED], at_once[BURST], delayed[SLACK], delayed[PACED]]
    return [
        _at_least("x INCRBY, three limits", 0.8, result["decisions"][THREE]["of_incrby"]),
        _at_least("x INCRBY, model and client limits", 0.7, result["decisions"][CLIENT]["of_incrby"]),
        _at_least("grants/s to all waiters", 5000, free["grants_per_second"]),
        _at_most("round trips per grant, target binding", 1, binding["round_trips_per_grant"]),
        _at_most("share of grants out of order", 0, max(free["overtaken"], binding["overtaken"])),
        _at_most("sends above the target at the backend", 0, sum(row["too_many"] for row in ours)),
        _at_most("bytes per send", 10, memory["bytes"]),
        _at_most("bytes per send with tokens", 26, memory["bytes_with_tokens"]),
    ]


def _at_least(what: str, aim: float, seen: float) -> Aim:
    return Aim(f"{what}, at least", aim, seen, seen >= aim)


def _at_most(what: str, aim: float, seen: float) -> Aim:
    return Aim(f"{what}, at most", aim, seen, seen <= aim)


def show(result: dict[str, Any], console: Console | None = None) -> None:
    """Prints the tables, and which rivals were skipped."""
    console = console or Console()
    for why in result["left_out"].values():
        console.print(f"Skipped: {why}", markup=False)
    console.print(_decisions(result["decisions"]), _waiters(result["waiters"]))
    for delayed in (False, True):
        console.print(_door(result["door"], delayed=delayed))
    console.print(_bytes(result["bytes"]), _aims(result))
    machine = result["machine"]
    console.print(
        f"{machine['cpus']} CPUs, Python {machine['python']}, "
        f"load {machine['load_before']:.1f} before and {machine['load_after']:.1f} after"
    )


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title)
    table.add_column(columns[0])
    for column in columns[1:]:
        table.add_column(column, justify="right")
    return table


def _decisions(decisions: dict[str, Any]) -> Table:
    table = _table(
        "Sequential decisions, all granted",
        "limiter",
        "per second",
        "x INCRBY",
        "range",
        "trips",
    )
    for name, row in decisions.items():
        if "of_incrby" not in row:
            table.add_row(name, f"{row['per_second']:,.0f}", "1", "", "1")
            continue
        spread = f"{row['of_incrby_lowest']:.2f}-{row['of_incrby_highest']:.2f}"
        trips = f"{row['round_trips_per_decision']:.2f}"
        table.add_row(name, f"{row['per_second']:,.0f}", f"{row['of_incrby']:.2f}", spread, trips)
    return table


def _waiters(waiters: dict[str, Any]) -> Table:
    binding = waiters["binding_per_second"]
    table = _table(
        f"{waiters['clients']:,} waiters in {waiters['processes']} processes: an unlimited target, and"
        f" one of {binding:,.0f}/s",
        *("limiter", "grants/s", "trips per grant", "out of order"),
        *("grants/s, binding", "trips per grant", "out of order"),
    )
    for name in waiters["free"]:
        cells = [
            text
            for row in (waiters["free"][name], waiters["binding"][name])
            for text in (
                f"{row['grants_per_second']:,.0f}",
                f"{row['round_trips_per_grant']:.3f}",
                f"{row['overtaken']:.1%}",
            )
        ]
        table.add_row(name, *cells)
    return table


def _door(door: dict[str, Any], *, delayed: bool) -> Table:
    low, high = door["delay_ms"]
    how = f"{low:g} to {high:g} ms after the grant" if delayed else "at once when granted"
    table = _table(
        f"At the backend: {door['target'].removesuffix(', burst')}, {door['windows']} windows, sent {how}",
        *("limiter", "most in a window", "too many", "usage", "unused grants", "trips per send"),
        "transit p99.9",
    )
    for name, row in door["delayed" if delayed else "at_once"].items():
        table.add_row(
            name,
            f"{row['most_in_a_window']:,} of {door['allowed']:,}",
            f"{row['too_many']:,}",
            f"{row['use']:.1%}",
            f"{row['unused_grants']:,}",
            f"{row['round_trips_per_send']:.2f}",
            f"{row['transit_p999_ms']:.0f} ms",
            style="red" if row["too_many"] else None,
        )
    return table


def _bytes(memory: dict[str, Any]) -> Table:
    table = _table("Redis bytes per send", "limiter", "requests", "with 100 tokens each")
    for name, row in memory.items():
        table.add_row(name, f"{row['bytes']:,.2f}", f"{row['bytes_with_tokens']:,.2f}")
    return table


def _aims(result: dict[str, Any]) -> Table:
    table = _table("Goals", "what", "goal", "measured", "")
    for what, aim, seen, reached in aims_of(result):
        table.add_row(what, f"{aim:,g}", f"{seen:,.3g}", "reached" if reached else "MISSED")
    return table


def draw(result: dict[str, Any], path: Path) -> None:
    """Plots decisions relative to INCRBY, the worst window at the backend, and usage of the target."""
    import matplotlib as mpl  # noqa: PLC0415 - slow to import, wanted here only

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    figure, (rates, worst, use) = plt.subplots(1, 3, figsize=(17, 4.5))
    compared = [(name, row) for name, row in result["decisions"].items() if "of_incrby" in row][::-1]
    errors = [
        [row["of_incrby"] - row["of_incrby_lowest"] for _, row in compared],
        [row["of_incrby_highest"] - row["of_incrby"] for _, row in compared],
    ]
    rates.barh([name for name, _ in compared], [row["of_incrby"] for _, row in compared], xerr=errors)
    rates.axvline(1.0, color="tab:gray", linestyle="--")
    rates.set_xlabel("decisions, x a bare INCRBY (median and range)")
    for panel, key, label in (
        (worst, "worst_window_ratio", "worst rolling window at the backend / N"),
        (use, "use", "usage of the target"),
    ):
        for offset, kind in ((-0.2, "at_once"), (0.2, "delayed")):
            rows = result["door"][kind]
            rows_at = [_names(result).index(name) - offset for name in rows]
            panel.barh(rows_at, [row[key] for row in rows.values()], height=0.4, label=kind.replace("_", " "))
        panel.set_yticks(range(len(_names(result))), _names(result))
        panel.axvline(1.0, color="tab:red", linestyle="--")
        panel.set_xlabel(label)
        panel.legend(title="sent")
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _names(result: dict[str, Any]) -> list[str]:
    door = result["door"]
    return list(dict.fromkeys([*door["delayed"], *door["at_once"]]))[::-1]
