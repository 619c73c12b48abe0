"""`python -m local up`: the embedded stack, until Ctrl-C, SIGTERM or the death of a part."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from local.launcher import ShowProgress, say_where, stop_on_signals
from local.parts import PartDied
from local.plan import StackOptions
from local.stack import Stack, StackError, StopRequested
from router.errors import RouterError

DEFAULT_DATA = Path(".stack")
CHECK_SECONDS = 0.5


def main(arguments: Sequence[str] | None = None) -> int:
    """0 after a wanted stop, 1 if the stack could not start or a part died."""
    options = _parser().parse_args(arguments)
    asked = stop_on_signals()
    begun = time.monotonic()
    with ShowProgress() as progress:
        stack = Stack(
            options.data,
            StackOptions(time_scale=options.time_scale),
            report=progress.report,
            stop_requested=asked.is_set,
        )
        try:
            stack.start()
            progress.done(f"Everything is up after {time.monotonic() - begun:.1f} s.")
            say_where(stack)
            _watch(stack, asked)
        except StopRequested:
            pass
        except (PartDied, StackError, RouterError, RuntimeError) as error:
            progress.failed(str(error))
            return 1
        finally:
            stack.stop()
        progress.done("Everything is stopped.")
    return 0


def _watch(stack: Stack, asked: threading.Event) -> None:
    while not asked.wait(CHECK_SECONDS):
        stack.check()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m local", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    up = commands.add_parser("up", help="start PostgreSQL, Redis, the Models Backend stand-in and Airflow")
    up.add_argument("--data", type=Path, default=DEFAULT_DATA, help="the data folder (default: %(default)s)")
    up.add_argument(
        "--time-scale",
        type=float,
        default=10.0,
        metavar="S",
        help="divide the stand-in's latencies by S (default: 10)",
    )
    return parser


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    sys.exit(main())
