"""Plot of a comparison: calls in flight and answers over time, one row per latency shape."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.side_by_side import Flow, Result

OLD_COLOUR, NEW_COLOUR, IDEAL_COLOUR = "#b5533c", "#2f6f9f", "#444444"
RATE_POINTS = 40


def draw(results: Sequence[Result], at_once: int, path: Path) -> None:
    """Writes the plot as PNG."""
    import matplotlib as mpl  # noqa: PLC0415 - slow to import, and only this needs it

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415 - as above, and after the backend is chosen

    figure, axes = plt.subplots(len(results), 2, figsize=(12, 3.2 * len(results)), squeeze=False)
    for result, (left, right) in zip(results, axes, strict=True):
        _in_flight(left, result, at_once)
        _throughput(right, result)
    axes[0][0].legend(loc="upper right", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _in_flight(axis: Any, result: Result, at_once: int) -> None:
    axis.step(result.old.at, result.old.in_flight, color=OLD_COLOUR, linewidth=0.9, label="old flow")
    axis.step(result.new.at, result.new.in_flight, color=NEW_COLOUR, linewidth=1.1, label="router")
    axis.axvline(result.ideal_seconds, color=IDEAL_COLOUR, linestyle=":", label="ideal: last answer")
    axis.set_ylim(0, at_once * 1.08)
    axis.set_xlabel("seconds (real)")
    axis.set_ylabel("calls in flight")
    axis.set_title(
        f"{result.shape}: {result.gain:.2f} x as fast, ideal {result.ideal_gain:.2f} x", fontsize=10
    )


def _throughput(axis: Any, result: Result) -> None:
    for flow, colour in ((result.old, OLD_COLOUR), (result.new, NEW_COLOUR)):
        at, rate = _rate(flow, result.old.seconds / RATE_POINTS)
        axis.step(at, rate, where="post", color=colour)
    axis.set_ylim(bottom=0)
    axis.set_xlabel("seconds (real)")
    axis.set_ylabel("answers a minute")
    axis.set_title(f"{result.tasks:,} tasks, {result.time_scale:g} times as fast as real", fontsize=10)


def _rate(flow: Flow, width: float) -> tuple[np.ndarray, np.ndarray]:
    edges = np.arange(0.0, flow.seconds + width, width)
    counts = np.interp(edges, flow.at, flow.answered)
    return edges, np.append(np.diff(counts) / width * 60.0, 0.0)
