"""`make demo-learning`: days of traffic on a fast clock, with a review every night and without one.

Two routers live through the same days, with the same prompts and the same weather. One learns from its log
and searches for better models every night, the other keeps the order of config/models.yaml. How good an
answer is the stand-in itself says, which made it: neither router sees that.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import signal
import sys
import threading
import time
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.learning_demo.night import spend_night
from bench.learning_demo.report import Teller
from bench.learning_demo.script import SHORTEST_DAYS, TIME_SCALE, Script, Task
from bench.learning_demo.side import Side, cancelled_once
from bench.learning_demo.stage import LearningStage
from bench.learning_demo.story import NAMES, SIDES, WITH, Day, Story
from local.launcher import stop_on_signals
from local.stack import StopRequested
from router.background import cancel_and_wait
from router.errors import RouterError

STOP_SECONDS = 0.1
SHOW_SECONDS = 0.25
MOST_DAYS = 60
LEAST = 10


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 when the demo ended or was asked to stop, 1 if it could not run."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.learning_demo", description=(__doc__ or "").partition("\n")[0]
    )
    _add_arguments(parser)
    options = parser.parse_args(arguments)
    console = Console(highlight=False)
    try:
        run(options, stop_on_signals(), console)
    except (RuntimeError, RouterError, OSError) as error:
        console.print(str(error), style="red", markup=False, soft_wrap=True)
        return 1
    return 0


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--days", type=_days, default=12, metavar="N", help="how many days (default: %(default)s)")
    add("--tasks", type=_count, default=600, metavar="N", help="prompts a day (default: %(default)s)")
    add("--seed", type=int, default=1, help="other prompts, other luck (default: %(default)s)")
    add("--json", type=Path, metavar="FILE", help="write what it came to there, as JSON")
    add("--plot", type=Path, metavar="FILE", help="draw it there (.png, .svg)")


def run(options: argparse.Namespace, asked: threading.Event, console: Console) -> bool:
    """The whole demo: True if it came to its end, False if somebody asked it to stop."""
    script = Script(days=options.days, seed=options.seed, tasks=options.tasks)
    story = play(script, asked, console)
    if story is None:
        return False
    if options.json is not None:
        options.json.write_text(json.dumps(story.as_json(), indent=2) + "\n")
    if options.plot is not None:
        from bench.learning_demo.plot import draw  # noqa: PLC0415 - matplotlib is slow to import

        draw(story, options.plot)
    return True


def play(script: Script, asked: threading.Event, console: Console) -> Story | None:
    """Play the script and tell it; None if somebody asked it to stop."""
    teller = Teller(console, script)
    story = Story(script)
    teller.going("starting PostgreSQL, Redis and the Models Backend")
    stage = LearningStage(SIDES, script.backend_arguments, time_scale=TIME_SCALE, stop_requested=asked.is_set)
    try:
        with stage, _router_log(stage.folder / "logs" / "router.log"):
            asyncio.run(_until_asked(_live(script, stage, teller, story), asked))
    except StopRequested:
        return None
    finally:
        teller.quiet()
    teller.summary(story)
    return story


@contextmanager
def _router_log(path: Path) -> Iterator[None]:
    """What the routers have to say goes to a file, and not between the tables."""
    handler = logging.FileHandler(path)
    logger = logging.getLogger("router")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()


async def _until_asked(work: Coroutine[Any, Any, None], asked: threading.Event) -> None:
    """Do the work, or end it, in good order, when somebody asks to stop: then StopRequested."""
    task = asyncio.create_task(work, name="demo of learning")
    try:
        while not task.done():
            await asyncio.wait({task}, timeout=STOP_SECONDS)
            if asked.is_set():
                raise StopRequested
        task.result()
    finally:
        await cancelled_once(task)


async def _live(script: Script, stage: LearningStage, teller: Teller, story: Story) -> None:
    flaws: dict[str, str | None] = {}
    folder = script.make_folder(stage.folder)
    said: set[str] = set()
    async with AsyncExitStack() as stack:
        sides = {
            name: await stack.enter_async_context(
                Side(name, stage.addresses[name], script.config(), stage.folder / "none")
            )
            for name in SIDES
        }
        for number in range(1, script.days + 1):
            tasks = script.day(number)
            await _until_a_period_begins(script.period_seconds)
            await asyncio.to_thread(stage.set_weather, script.weather(number))
            news = [*script.news(number), *_trusted(story, sides[WITH], script)]
            teller.morning(number, news)
            await _live_one_day(sides, tasks, teller, number)
            await asyncio.to_thread(stage.check)
            flaws |= await asyncio.to_thread(stage.new_flaws)
            facts = {name: await side.facts(tasks, flaws) for name, side in sides.items()}
            teller.going(f"night {number}")
            night = await spend_night(stage.addresses[WITH], script.config(), script, folder, said)
            story.days.append(Day(number, tuple(news), facts, night))
            teller.night(story.days[-1])


def _trusted(story: Story, side: Side, script: Script) -> list[str]:
    """What the operator does in the morning: a model that was promoted may be sent what the others may."""
    promoted = story.days[-1].night.promoted if story.days else ()
    for model in promoted:
        side.variables[model] = script.target
    return [f"the operator sets traffic.{model} to {script.target}, as the others have" for model in promoted]


async def _until_a_period_begins(seconds: int) -> None:
    """So that the evidence of a period is of one weather only."""
    await asyncio.sleep(seconds - time.time() % seconds)


async def _live_one_day(
    sides: Mapping[str, Side], tasks: Sequence[Task], teller: Teller, number: int
) -> None:
    living = [asyncio.create_task(side.live(tasks), name=f"day {number}, {name}")
              for name, side in sides.items()]  # fmt: skip
    showing = asyncio.create_task(_show(sides, teller, number), name="show how far the day is")
    try:
        await asyncio.gather(*living)
    finally:
        await cancel_and_wait(*living, showing)


async def _show(sides: Mapping[str, Side], teller: Teller, number: int) -> None:
    while True:
        left = ", ".join(f"{side.unsolved} {NAMES[name]}" for name, side in sides.items())
        teller.going(f"day {number}: prompts that wait for an answer: {left}")
        await asyncio.sleep(SHOW_SECONDS)


def _days(text: str) -> int:
    number = int(text)
    if not SHORTEST_DAYS <= number <= MOST_DAYS:
        raise argparse.ArgumentTypeError(f"from {SHORTEST_DAYS} to {MOST_DAYS}")
    return number


def _count(text: str) -> int:
    number = int(text)
    if number < LEAST:
        raise argparse.ArgumentTypeError(f"at least {LEAST}")
    return number


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    sys.exit(main())
