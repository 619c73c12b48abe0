"""`python -m local up` and `demo`: the embedded stack, until Ctrl-C, SIGTERM or the death of a part.

`python -m local demo-learning`: days of traffic on a fast clock, on parts of its own that go with it.
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from local import demo, learning_demo
from local.launcher import ShowProgress, say_where, stop_on_signals
from local.plan import StackOptions
from local.stack import Stack, StopRequested
from router.errors import RouterError

DEFAULT_DATA = Path(".stack")
DEFAULT_TIME_SCALE = 10.0
CHECK_SECONDS = 0.5


def main(arguments: Sequence[str] | None = None) -> int:
    """0 after a wanted stop; 1 if the stack could not start, a part died or the demo went badly."""
    options = _parser().parse_args(arguments)
    asked = stop_on_signals()
    console = Console(highlight=False)
    if options.command == "demo-learning":
        return _show_learning(options, asked, console)
    with ShowProgress(console) as progress:
        stack = Stack(
            options.data,
            StackOptions(time_scale=options.time_scale),
            report=progress.report,
            stop_requested=asked.is_set,
        )
        well = False
        try:
            well = _serve(stack, options, asked, progress, console)
        except StopRequested:
            well = True
        except (RuntimeError, RouterError) as error:
            progress.failed(str(error))
        finally:
            stack.stop()
        progress.done("Everything is stopped.")
    return 0 if well else 1


def _show_learning(options: argparse.Namespace, asked: threading.Event, console: Console) -> int:
    try:
        learning_demo.run(options, asked, console)
    except (RuntimeError, RouterError, OSError) as error:
        console.print(str(error), style="red", markup=False, soft_wrap=True)
        return 1
    return 0


def _serve(
    stack: Stack,
    options: argparse.Namespace,
    asked: threading.Event,
    progress: ShowProgress,
    console: Console,
) -> bool:
    begun = time.monotonic()
    stack.start()
    progress.done(f"Everything is up after {time.monotonic() - begun:.1f} s.")
    say_where(stack, console)
    well = True
    if options.command == "demo":
        well = demo.run_demo(stack, options, asked, console)
        if options.exit:
            return well
        console.print("The stack stays open: Ctrl-C stops it.")
    while not asked.wait(CHECK_SECONDS):
        stack.check()
    return well


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    add = common.add_argument
    add("--data", type=Path, default=DEFAULT_DATA, metavar="FOLDER", help="where it keeps its data (.stack)")
    add(
        "--time-scale", type=float, default=DEFAULT_TIME_SCALE, metavar="S", help="divide latencies by S (10)"
    )
    parser = argparse.ArgumentParser(prog="python -m local", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("up", parents=[common], help="start the stack and leave it open")
    demo.add_arguments(commands.add_parser("demo", parents=[common], help=demo.__doc__))
    learning = (learning_demo.__doc__ or "").partition("\n")[0]
    learning_demo.add_arguments(commands.add_parser("demo-learning", help=learning))
    return parser


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    sys.exit(main())
