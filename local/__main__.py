"""`python -m local up`: the embedded stack, until Ctrl-C, SIGTERM or the death of a process."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence

from local.launcher import add_stack_arguments, run_stack


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 after a requested stop, 1 if the stack could not start or a process died."""
    parser = argparse.ArgumentParser(prog="python -m local", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    up = commands.add_parser("up", help="start the stack and leave it open")
    add_stack_arguments(up)
    return run_stack(parser.parse_args(arguments))


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    sys.exit(main())
