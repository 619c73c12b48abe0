"""Drains real prompts through the whole embedded stack, and adds a model during the drain.

The DAG runs and waits for work before the prompts are loaded.

    python -m bench.drain --prompts FOLDER [--tasks 5000] [--target 150/min] [--json FILE]

FOLDER contains JSONL files with `prompt` and `category`. Prints the time against the bound, the judge's
table, and the longest time each model was idle although it could have sent (the new one: since it was added).
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.demo_report import DemoReport, TaskFacts, make_report, task_facts
from bench.judge import Arrival, read_arrivals
from local.airflow_api import AirflowApi
from local.stack import Stack
from local.stack_plan import StackOptions
from router.database import connect, rows
from router.limiter import LimiterSettings
from router.models import sync_roster
from router.settings import RouterConfig, load_config
from router.settings.models import ModelSettings
from router.traffic import TrafficTarget

NEWCOMER = "newcomer-7b"
START_SECONDS = 60.0
MOST_IDLE_SECONDS = 5.0
MOST_OVER_BOUND = 1.03


def main() -> int:
    """Exit status: 0 if everything was solved within the limits."""
    options = _arguments()
    console = Console()
    config = _config(options.target)
    with tempfile.TemporaryDirectory(prefix="router-drain-") as folder:
        started = time.time()
        backend = ("--also", NEWCOMER)
        stack_options = StackOptions(time_scale=options.time_scale, backend_arguments=backend)
        with Stack(Path(folder) / "stack", stack_options) as stack:
            report, added_at = _drain(stack, config, options, started)
        arrivals = read_arrivals(stack.arrival_log)
    idle = _idle(arrivals, TrafficTarget.parse(options.target), added_at)
    return _tell(console, report, idle, options.json)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", type=Path, required=True, help="a folder of JSONL files")
    parser.add_argument("--tasks", type=int, default=5000)
    parser.add_argument("--target", default="150/min", help="of every model; one request window")
    parser.add_argument("--time-scale", type=float, default=20.0)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def _config(target: str) -> RouterConfig:
    config = load_config()
    models = {name: model.model_copy(update={"target": target}) for name, model in config.models.items()}
    return config.model_copy(update={"models": models})


def _drain(
    stack: Stack, config: RouterConfig, options: argparse.Namespace, started: float
) -> tuple[DemoReport, float]:
    with stack.api() as api:
        for name, model in config.models.items():
            api.set_variable(f"traffic.{name}", model.target)
        api.pause("solve_tasks", paused=False)
        _until_it_waits(api)
    since = time.monotonic()
    _load(stack, options.prompts, options.tasks)
    while _facts(stack).solved < options.tasks // 2:
        time.sleep(0.5)
    newcomer = ModelSettings(target=options.target, ranks=dict.fromkeys(config.categories, 5))
    with connect(stack.database_url) as connection:
        sync_roster(connection, config.model_copy(update={"models": {**config.models, NEWCOMER: newcomer}}))
    added_at = time.monotonic()
    with stack.api() as api:
        api.create_variable(f"traffic.{NEWCOMER}", options.target)
    while _facts(stack).finished < options.tasks:
        stack.check()
        time.sleep(0.5)
    time.sleep(1.0)  # the backend writes its log shortly after the answers
    with connect(stack.database_url) as connection:
        for row in rows(connection, "SELECT id, failure FROM tasks WHERE status = 'failed' LIMIT 10"):
            print(f"task {row['id']} failed: {row['failure']}")
        return make_report(connection, "drain/", stack.arrival_log, started, since), added_at


def _until_it_waits(api: AirflowApi) -> None:
    """Waits until a run waits for work: Airflow's first start is over."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        for run in api.runs("solve_tasks", limit=1):
            for entry in api.task_instances("solve_tasks", run["dag_run_id"]):
                if entry["task_id"] == "wait_for_work" and entry["triggerer_job"]:
                    return
        time.sleep(0.2)
    raise TimeoutError(f"no run of solve_tasks waits for work after {START_SECONDS:.0f} s")


def _facts(stack: Stack) -> TaskFacts:
    with connect(stack.database_url) as connection:
        return task_facts(connection, "drain/")


def _load(stack: Stack, folder: Path, tasks: int) -> None:
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl", encoding="utf-8") as file:
        for number, row in enumerate(itertools.islice(_rows(folder), tasks)):
            line = {"custom_id": f"{number:06}", "prompt": row["prompt"], "category": row.get("category")}
            file.write(json.dumps(line) + "\n")
        file.flush()
        command = [sys.executable, "-m", "router.cli", "load", file.name, "--id-prefix", "drain/"]
        subprocess.run(
            command, env={**stack.addresses, "PATH": "/usr/bin:/bin"}, check=True, capture_output=True
        )


def _rows(folder: Path) -> Iterator[Mapping[str, Any]]:
    """Prompts of all files, interleaved, so that every source is represented."""
    files = [path.read_text(encoding="utf-8").splitlines() for path in sorted(folder.glob("*.jsonl"))]
    for lines in itertools.zip_longest(*files):
        for line in lines:
            if line is not None:
                yield json.loads(line)


def _idle(arrivals: Sequence[Arrival], target: TrafficTarget, added_at: float) -> dict[str, float]:
    """model -> longest time in seconds before its last send in which it could have sent and did not."""
    limit, slacks = target.requests[0], LimiterSettings().slacks(target.requests[0].window_seconds)
    period = limit.window_seconds + slacks.send + slacks.transit
    by_model: dict[str, list[float]] = defaultdict(list)
    for arrival in sorted(arrivals, key=lambda arrival: arrival.at):
        by_model[str(arrival.model)].append(arrival.at)
    idle = {}
    for model, times in by_model.items():
        free = [max(before + target.gap_seconds, _left(times, index, limit.count, period))
                for index, before in enumerate(times[:-1], start=1)]  # fmt: skip
        idle[model] = max((at - since for at, since in zip(times[1:], free, strict=True)), default=0.0)
    if NEWCOMER in by_model:
        idle[NEWCOMER] = max(idle[NEWCOMER], by_model[NEWCOMER][0] - added_at)
    return idle


def _left(times: Sequence[float], index: int, count: int, period: float) -> float:
    return times[index - count] + period if index >= count else 0.0


def _tell(console: Console, report: DemoReport, idle: Mapping[str, float], file: Path | None) -> int:
    report.show(console)
    for model, seconds in sorted(idle.items()):
        console.print(f"{model:20} idle at most {seconds:6.2f} s")
    over = (report.seconds or 0.0) / (report.bound_seconds or 1.0)
    console.print(f"{over:.3f} x the bound (target: at most {MOST_OVER_BOUND})")
    if file is not None:
        document = {**report.as_json(), "idle_seconds": dict(idle), "over_bound": over}
        file.write_text(json.dumps(document, indent=2) + "\n")
    good = (
        report.facts.solved == report.facts.tasks
        and report.verdict.breach_count == 0
        and over <= MOST_OVER_BOUND
        and NEWCOMER in idle
        and max(idle.values()) <= MOST_IDLE_SECONDS
    )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
