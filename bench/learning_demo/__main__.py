"""`make demo-learning`: days of traffic on a fast clock, with a nightly review and without one.

Two routers solve the same prompts under the same simulated conditions. One learns from its call log and
searches for better models every night; the other keeps the order of config/models.yaml. The stand-in, which
makes the answers, says how good they are; neither router sees that.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import shutil
import signal
import sys
import threading
import time
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.status import Status

from bench.learning_demo.report import draw, print_day, print_line, print_summary
from bench.learning_demo.scenario import MIN_DAYS, TIME_SCALE, Scenario, Task
from bench.learning_demo.services import Services
from bench.learning_demo.side import Side, cancelled_once
from bench.learning_demo.story import SIDES, WITH, Day, Story, run_night
from local.launcher import stop_on_signals
from local.stack import StopRequested
from router.background import cancel_and_wait
from router.errors import RouterError
from router.settings import DEFAULT_CONFIG_FOLDER

STOP_SECONDS = 0.1
PROGRESS_SECONDS = 0.25
MAX_DAYS = 60
MIN_TASKS = 10


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 when the demo ended or was asked to stop, 1 if it could not run."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.learning_demo", description=(__doc__ or "").partition("\n")[0]
    )
    add = parser.add_argument
    add("--days", type=_between(MIN_DAYS, MAX_DAYS), default=12, help="number of days (%(default)s)")
    add("--tasks", type=_between(MIN_TASKS, 10**6), default=600, help="prompts per day (%(default)s)")
    add("--seed", type=int, default=1, help="seed of prompts and chance (%(default)s)")
    add("--json", type=Path, metavar="FILE", help="write the results as JSON")
    add("--plot", type=Path, metavar="FILE", help="draw the results (.png, .svg)")
    options = parser.parse_args(arguments)
    console = Console(highlight=False)
    scenario = Scenario(days=options.days, seed=options.seed, tasks=options.tasks)
    try:
        story = play(scenario, stop_on_signals(), console)
    except (RuntimeError, RouterError, OSError) as error:
        console.print(str(error), style="red", markup=False, soft_wrap=True)
        return 1
    if story is not None and options.json is not None:
        options.json.write_text(json.dumps(story.as_json(), indent=2) + "\n")
    if story is not None and options.plot is not None:
        draw(story, options.plot)
    return 0


def _between(low: int, high: int) -> Any:
    def number(text: str) -> int:
        if not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return int(text)

    return number


def play(scenario: Scenario, stop: threading.Event, console: Console) -> Story | None:
    """Run all days and print them; None if `stop` was set before the end."""
    story = Story(scenario)
    progress = console.status("starting PostgreSQL, Redis and the Models Backend")
    try:
        with (
            progress,
            Services(tuple(SIDES), stop.is_set) as services,
            _log_to(services.folder / "router.log"),
        ):
            services.start(scenario.backend_arguments(services.folder), TIME_SCALE)
            asyncio.run(_until_stopped(_run_days(story, services, console, progress), stop))
    except StopRequested:
        return None
    print_summary(story, console)
    return story


@contextmanager
def _log_to(path: Path) -> Iterator[None]:
    """The routers' log goes to a file, not between the tables."""
    handler = logging.FileHandler(path)
    logger = logging.getLogger("router")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()


async def _until_stopped(work: Coroutine[Any, Any, None], stop: threading.Event) -> None:
    """Do the work; when `stop` is set, let it clean up and raise StopRequested."""
    task = asyncio.create_task(work)
    try:
        while not task.done():
            await asyncio.wait({task}, timeout=STOP_SECONDS)
            if stop.is_set():
                raise StopRequested
        task.result()
    finally:
        await cancelled_once(task)


async def _run_days(story: Story, services: Services, console: Console, progress: Status) -> None:
    scenario, flaws, shown = story.scenario, dict[str, str | None](), set[str]()
    folder = services.folder / "config"  # the search writes into it
    shutil.copytree(DEFAULT_CONFIG_FOLDER, folder, ignore=shutil.ignore_patterns("discovered.yaml"))
    promoted: tuple[str, ...] = ()
    async with AsyncExitStack() as stack:
        sides = {
            name: await stack.enter_async_context(
                Side(addresses, scenario.config(), services.folder / "no-knowledge")
            )
            for name, addresses in services.addresses.items()
        }
        for number in range(1, scenario.days + 1):
            tasks = scenario.day(number)
            # The evidence of a period is then of one day's conditions only.
            await asyncio.sleep(scenario.period_seconds - time.time() % scenario.period_seconds)
            await asyncio.to_thread(services.set_conditions, scenario.conditions(number))
            news = [
                *scenario.news(number),
                *(f"the operator sets traffic.{m} to {scenario.target}" for m in promoted),
            ]
            sides[WITH].variables |= dict.fromkeys(promoted, scenario.target)
            console.print(f"\nDay {number} of {scenario.days}", style="bold")
            for line in news:
                print_line(line, console, "yellow")
            await _run_day(sides, tasks, number, progress)
            await asyncio.to_thread(services.check)
            flaws |= await asyncio.to_thread(services.new_flaws)
            results = {name: await side.results(tasks, flaws) for name, side in sides.items()}
            progress.update(f"night {number}")
            addresses = services.addresses[WITH]
            night = await asyncio.to_thread(run_night, addresses, scenario.config(), scenario, folder, shown)
            promoted = night.promoted
            story.days.append(Day(number, tuple(news), results, night))
            print_day(story.days[-1], console)


async def _run_day(sides: Mapping[str, Side], tasks: Sequence[Task], number: int, progress: Status) -> None:
    days = [asyncio.create_task(side.solve_day(tasks)) for side in sides.values()]
    showing = asyncio.create_task(_show(sides, number, progress))
    try:
        await asyncio.gather(*days)
    finally:
        await cancel_and_wait(*days, showing)


async def _show(sides: Mapping[str, Side], number: int, progress: Status) -> None:
    while True:
        unsolved = ", ".join(f"{side.unsolved} {SIDES[name]}" for name, side in sides.items())
        progress.update(f"day {number}: unsolved tasks: {unsolved}")
        await asyncio.sleep(PROGRESS_SECONDS)


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    sys.exit(main())
