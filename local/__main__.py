"""`python -m local up`: runs the embedded stack until Ctrl-C or SIGTERM, and restarts processes that die."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence

from local.launcher import add_stack_arguments, run_stack


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 after a requested stop, 1 if it failed or a process died too often."""
    parser = argparse.ArgumentParser(prog="python -m local", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    up = commands.add_parser("up", help="start the stack and keep it running")
    add_stack_arguments(up)
    return run_stack(parser.parse_args(arguments))


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    sys.exit(main())
