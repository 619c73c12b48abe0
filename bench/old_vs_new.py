"""Compares the old flow (20 workers, batches of ten) with the router at equal concurrency.

Both solve the same backlog through the same stand-in, with 200 concurrent calls and no other limit, on the
same PostgreSQL. Time counts from the start of the first run until the last answer is written; starting
Airflow counts for neither. The ideal is computed: the same calls, in order, in 200 slots of which none is
idle while a task is left, without any overhead. With few tasks another order can end slightly sooner.

    gain         seconds of the old flow / seconds of the router
    ideal gain   seconds of the old flow / seconds of the ideal
    share        gain / ideal gain; 97 % is the aim

The second table shows where the old flow loses time: the share of slot time in calls and in each kind of
wait, and the speed-up without each wait alone. The last table shows a provider whose quota is half of what
200 concurrent calls need: calls sent per task, and time against tasks / quota. It is computed from the same
latencies; --computed prints only that, in a second.

    python -m bench.old_vs_new [--tasks 5000] [--shapes even,lognormal,llmperf] [--json] [--computed]

Writes old_vs_new.json and old_vs_new.png into bench/results/. Exit code 1 if a share is below the aim.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.old_vs_new_plot import draw
from bench.schedules import OldRun, OldShape, ideal_seconds, simulate_old
from bench.side_by_side import ENDPOINT, SHAPES, Bench, Parts, Result, drawn_latencies, measure
from local.postgres import start_postgres
from local.redis import start_redis
from models_backend.quota import Quotas
from router.settings import ROOT
from router.traffic import TrafficTarget

AIM = 0.97
# Airflow 3.3.2 on two cores: 1.4 to 2.5 s from the start of a run to the first line of a mapped Airflow task.
GAP_SECONDS = 2.0
QUOTA_SHARE = 0.5
PLAIN_COLUMNS = 190

WITHOUT: dict[str, dict[str, Any]] = {
    "slowest of ten": {"waits_for_batch": False},
    "own parts": {"own_parts": False},
    "gap": {"gap_seconds": 0.0},
    "30 min stop": {"limit_seconds": float("inf")},
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints and writes the results. Exit status 1 if a share is below the aim."""
    options = _parser().parse_args(arguments)
    old = OldShape(gap_seconds=options.gap_seconds)
    bench = Bench(options.tasks, options.seed, options.time_scale, old)
    shapes = options.shapes.split(",")
    if options.computed:
        found = {shape: losses(shape, bench) for shape in shapes}
        if options.json:
            print(json.dumps(found))
        else:
            _console().print(_loss_table(found))
        return 0
    results = _measure_all(shapes, bench)
    document = [_document(result, bench) for result in results]
    folder: Path = options.output
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "old_vs_new.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    draw(results, old.at_once, folder / "old_vs_new.png")
    if options.json:
        print(json.dumps(document))
    else:
        console = _console()
        console.print(_gain_table(results))
        console.print(_loss_table({row["shape"]: row["losses"] for row in document}))
    return int(any(result.share < AIM for result in results))


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else PLAIN_COLUMNS)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.old_vs_new", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    add = parser.add_argument
    add("--tasks", type=int, default=5000, metavar="N")
    add("--shapes", default=",".join(SHAPES), help=f"some of {', '.join(SHAPES)}")
    add("--seed", type=int, default=0, help="another seed draws other latencies")
    add("--time-scale", type=float, metavar="S", help="divide all times by S instead of by the shape's own")
    add("--gap-seconds", type=float, default=GAP_SECONDS, help="between two runs of the old DAG")
    add("--output", type=Path, default=ROOT / "bench" / "results", metavar="FOLDER")
    add("--computed", action="store_true", help="only what the old flow loses, which needs no run")
    add("--json", action="store_true", help="print JSON instead of tables")
    return parser


def _measure_all(shapes: Sequence[str], bench: Bench) -> list[Result]:
    with tempfile.TemporaryDirectory(prefix="old-vs-new-") as name:
        folder = Path(name)
        postgres = start_postgres(folder / "postgres")
        redis = start_redis(folder / "redis")
        try:
            return [measure(shape, bench, Parts(postgres, redis, folder)) for shape in shapes]
        finally:
            redis.stop()
            postgres.stop()


def losses(shape: str, bench: Bench) -> dict[str, Any]:
    """Where the old flow loses time: shares of slot time, and gains without each wait."""
    latencies = drawn_latencies(shape, bench.tasks, bench.seed)
    whole = simulate_old(latencies, bench.old)
    killed = simulate_old(latencies, replace(bench.old, killed_at_limit=True))
    return {
        "shares": _shares(whole, bench.old),
        "gain_without": {
            name: whole.seconds / simulate_old(latencies, replace(bench.old, **change)).seconds
            for name, change in WITHOUT.items()
        },
        "slower_if_killed_at_limit": killed.seconds / whole.seconds,
        "over_quota": _over_quota(latencies, bench.old),
    }


def _over_quota(latencies: Sequence[float], shape: OldShape) -> dict[str, float]:
    """The old flow against a provider whose quota is half of its throughput (calls per minute)."""
    quota = max(1, int(len(latencies) / ideal_seconds(latencies, shape.at_once) * 60 * QUOTA_SHARE))
    door = Quotas({ENDPOINT: TrafficTarget.parse(f"{quota}/min")})
    run = simulate_old(latencies, shape, lambda at: door.enter(ENDPOINT, at, 0) is None)
    return {
        "quota_per_minute": quota,
        "calls_a_task": run.sent / len(latencies),
        "refused_share": run.refused / run.sent,
        "times_the_bound": run.seconds / (len(latencies) / quota * 60),
    }


def _shares(run: OldRun, shape: OldShape) -> dict[str, float]:
    whole = run.seconds * shape.at_once
    return {
        "calls": run.working / whole,
        "slowest of ten": run.for_batch / whole,
        "slowest worker": run.for_workers / whole,
        "gap": run.for_restart / whole,
    }


def _document(result: Result, bench: Bench) -> dict[str, Any]:
    return {
        **asdict(result),
        "gain": result.gain,
        "ideal_gain": result.ideal_gain,
        "share": result.share,
        "losses": losses(result.shape, bench),
    }


def _gain_table(results: Sequence[Result]) -> Table:
    table = Table(title=f"{results[0].tasks:,} tasks, 200 concurrent calls, real seconds")
    for name in ("latencies", "scale", "old", "old computed", "runs", "router", "ideal", "gain", "ideal gain",
                 "share", "slots busy", "late old/new", "load"):  # fmt: skip
        table.add_column(name, justify="left" if name == "latencies" else "right")
    for result in results:
        table.add_row(
            result.shape, f"{result.time_scale:g}", f"{result.old.seconds:,.0f}",
            f"{result.old_simulated.seconds:,.0f}", str(result.old_runs), f"{result.new.seconds:,.0f}",
            f"{result.ideal_seconds:,.0f}", f"{result.gain:.2f}", f"{result.ideal_gain:.2f}",
            f"{result.share:.1%}", f"{result.new.busy_share:.1%}",
            f"{result.old.late_ms:.1f}/{result.new.late_ms:.1f} ms", f"{result.load_average:.1f}",
        )  # fmt: skip
    return table


def _loss_table(found: Mapping[str, dict[str, Any]]) -> Table:
    table = Table(title="The old flow, computed: where its slots spend their time; its gain without one wait")
    table.add_column("latencies")
    first = next(iter(found.values()))
    for name in first["shares"]:
        table.add_column(name, justify="right")
    for name in first["gain_without"]:
        table.add_column(f"without {name}", justify="right")
    for name in ("half the quota: calls a task", "time / bound"):
        table.add_column(name, justify="right")
    for shape, row in found.items():
        shares = [f"{share:.1%}" for share in row["shares"].values()]
        gains = [f"{gain:.2f} x" for gain in row["gain_without"].values()]
        over = row["over_quota"]
        table.add_row(shape, *shares, *gains, f"{over['calls_a_task']:.2f}", f"{over['times_the_bound']:.2f}")
    return table


if __name__ == "__main__":
    sys.exit(main())
