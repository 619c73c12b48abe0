"""The picture of the demo of learning: places by night, good answers and the failing model's share by day."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.learning_demo.cast import CATEGORIES, FAILING
from bench.learning_demo.script import Script
from bench.learning_demo.story import NAMES, SIDES, WITH, WITHOUT, Story

COLOURS = ("#2f6f9f", "#b5533c", "#3f8f5f", "#8a6bb0", "#c28b2c", "#4aa3a3", "#8c564b", "#c05a94", "#7f7f7f")
SIDE_COLOURS = {WITH: "#2f6f9f", WITHOUT: "#b5533c"}
LABEL_ROOM = 0.36  # of a panel's nights, to the right, for the models' names


def draw(story: Story, path: Path) -> None:
    """Write the picture; the name's ending says as what: .png, .svg, .pdf."""
    import matplotlib as mpl  # noqa: PLC0415 - slow to import, and only this needs it

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415 - as above, and after the backend is chosen

    figure, axes = plt.subplots(2, 3, figsize=(13.5, 7.2))
    names = sorted({model for day in story.days for order in day.night.after.values() for model in order})
    colours = {model: COLOURS[place % len(COLOURS)] for place, model in enumerate(names)}
    for axis, category in zip(axes[0], CATEGORIES, strict=True):
        _places(axis, story, category, colours)
    _by_day(axes[1][0], story, asked=False)
    _by_day(axes[1][1], story, asked=True)
    _shares(axes[1][2], story)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _places(axis: Any, story: Story, category: str, colours: dict[str, str]) -> None:
    """From the order of the first morning, drawn at night 0, to that of the last night."""
    lines: dict[str, list[tuple[int, int]]] = {}
    for model, stands in story.days[0].night.before.get(category, {}).items():
        lines.setdefault(model, []).append((0, stands.place))
    for day in story.days:
        order = day.night.after.get(category, {})
        for model, stands in order.items():
            lines.setdefault(model, []).append((day.number, stands.place))
    ranks = _dense(lines)
    last = story.days[-1].number
    for model, points in sorted(ranks.items()):
        nights, places = zip(*points, strict=True)
        axis.plot(nights, places, color=colours[model], marker="o", markersize=3, linewidth=1.6)
        if nights[-1] == last:
            axis.text(last + 0.2, places[-1], model, color=colours[model], fontsize=8, va="center")
    _shade(axis, story.script, category)
    axis.invert_yaxis()
    axis.set_xlim(0, last * (1 + LABEL_ROOM))
    axis.set_yticks(range(1, len(lines) + 1))
    axis.set_xticks(range(0, last + 1, 2))
    axis.set_title(f"{category}: places after each night", fontsize=10)
    axis.set_xlabel("night")


def _dense(lines: dict[str, list[tuple[int, int]]]) -> dict[str, list[tuple[int, int]]]:
    """The same orders with places from 1 on: a file's places may leave some out."""
    by_night: dict[int, list[tuple[int, str]]] = {}
    for model, points in lines.items():
        for night, place in points:
            by_night.setdefault(night, []).append((place, model))
    found: dict[str, list[tuple[int, int]]] = {}
    for night in sorted(by_night):
        for place, (_, model) in enumerate(sorted(by_night[night]), 1):
            found.setdefault(model, []).append((night, place))
    return found


def _by_day(axis: Any, story: Story, *, asked: bool) -> None:
    for name in SIDES:
        good = []
        for day in story.days:
            tasks = [task for task in day.sides[name].tasks if task.asked == asked]
            good.append(100 * sum(task.good for task in tasks) / max(1, len(tasks)))
        numbers = [day.number for day in story.days]
        axis.plot(numbers, good, color=SIDE_COLOURS[name], marker="o", markersize=3, label=NAMES[name])
    _shade(axis, story.script, "technical")
    what = "prompts that were asked" if asked else "the backlog's prompts"
    axis.set_title(f"{what}: good answers, %", fontsize=10)
    axis.set_xlabel("day")
    axis.legend(fontsize=8, loc="lower right")


def _shares(axis: Any, story: Story) -> None:
    for name in SIDES:
        shares = [100 * day.sides[name].share_of_calls(FAILING, "technical") for day in story.days]
        numbers = [day.number for day in story.days]
        axis.plot(numbers, shares, color=SIDE_COLOURS[name], marker="o", markersize=3, label=NAMES[name])
    share = 100 * story.script.learning().exploration.share
    axis.axhline(share, color="#444444", linestyle=":", label="share of exploration")
    _shade(axis, story.script, "technical")
    axis.set_ylim(bottom=0)
    axis.set_title(f"{FAILING}'s calls in technical, % of the tasks", fontsize=10)
    axis.set_xlabel("day")
    axis.legend(fontsize=8)


def _shade(axis: Any, script: Script, category: str) -> None:
    if category == "technical":
        days = script.failing_days
        axis.axvspan(days.start - 0.5, days.stop - 0.5, color="#b5533c", alpha=0.10, linewidth=0)
