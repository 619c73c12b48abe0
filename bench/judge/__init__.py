"""Judges an arrival log: did any rolling window exceed its traffic target, and how much of it was used."""

from bench.judge.arrivals import Arrival, TargetChange, read_arrivals, read_changes
from bench.judge.verdict import ModelVerdict, Verdict, judge, print_verdict

__all__ = [
    "Arrival",
    "ModelVerdict",
    "TargetChange",
    "Verdict",
    "judge",
    "print_verdict",
    "read_arrivals",
    "read_changes",
]
