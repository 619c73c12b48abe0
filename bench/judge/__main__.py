"""Judges an arrival log: `python -m bench.judge ARRIVALS.jsonl TARGETS.jsonl [--json]`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.judge.arrivals import (
    read_arrivals,
    read_changes,
)
from bench.judge.verdict import judge, print_verdict
from router.errors import InputError


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 without a breach, 1 with breaches, 2 if the input is invalid."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.judge", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument(
        "arrivals", type=Path, help="JSONL: at, ended_at, model, request_id, tokens_reserved, ..."
    )
    parser.add_argument("targets", type=Path, help="JSONL: at_seconds, model, target")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.add_argument("--backlog-from", type=float, help="seconds; default: the first arrival")
    parser.add_argument("--backlog-until", type=float, help="seconds; default: the last arrival")
    parser.add_argument(
        "--settle-seconds", type=float, default=1.0, help="from an edit until it applies (default 1)"
    )
    parser.add_argument("--tokens", choices=("corrected", "reserved"), default="corrected")
    parser.add_argument(
        "--utc-offset-seconds",
        type=float,
        default=0.0,
        help="UTC minus the times: for calendar periods",
    )
    options = parser.parse_args(arguments)
    try:
        arrivals, changes = read_arrivals(options.arrivals), read_changes(options.targets)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    times = [arrival.at for arrival in arrivals]
    verdict = judge(
        arrivals,
        changes,
        backlog_from=min(times, default=None) if options.backlog_from is None else options.backlog_from,
        backlog_until=max(times, default=None) if options.backlog_until is None else options.backlog_until,
        settle_seconds=options.settle_seconds,
        tokens=options.tokens,
        utc_offset_seconds=options.utc_offset_seconds,
    )
    if options.json:
        print(json.dumps(verdict.as_json(), indent=2))
    else:
        print_verdict(verdict)
    return 1 if verdict.breach_count else 0


if __name__ == "__main__":
    sys.exit(main())
