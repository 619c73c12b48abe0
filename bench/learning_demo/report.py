"""The story in a terminal, a table per night and a summary, and as a picture."""

from __future__ import annotations

import textwrap
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from bench.learning_demo.scenario import CATEGORIES, DEAR, FAILING, SLOW
from bench.learning_demo.story import SIDES, Day, Night, Rank, Story, share_good

MAX_REASONS = 6
STEPS = (" lost: ", " taken: ", " promoted: ", " retired: ")
UNRANKED = Rank(10**6, "")


def print_day(day: Day, console: Console) -> None:
    """Answers of both sides, ranking before and after the night, and why it changed."""
    for name, title in SIDES.items():
        tasks = day.sides[name].tasks
        interactive = [task for task in tasks if task.interactive]
        shares = f"{share_good(tasks):6.1%} good answers; interactive {share_good(interactive):6.1%}"
        console.print(Text(f"  {title:13}  {shares}"))
    console.print(_ranking(day.number, day.night))
    for line in _reasons(day.night):
        print_line(line, console)
    for line in day.night.discovery:
        print_line(f"discovery: {line}", console, "cyan")


def print_line(line: str, console: Console, style: str = "") -> None:
    """One line, indented and wrapped to the terminal."""
    first, *others = textwrap.wrap(line, max(20, console.width - 4), break_long_words=False) or [""]
    console.print(Text("\n".join([f"  {first}", *(f"    {other}" for other in others)]), style))


def _ranking(number: int, night: Night) -> Table:
    table = Table(title=f"Night {number}: ranks before and after", title_justify="left")
    for column in ("model", *CATEGORIES):
        table.add_column(column, no_wrap=True)
    for model in sorted({model for ranking in night.after.values() for model in ranking}):
        ranks = [(night.before.get(c, {}).get(model), night.after.get(c, {}).get(model)) for c in CATEGORIES]
        table.add_row(model, *(_cell(*pair) for pair in ranks))
    return table


def _cell(before: Rank | None, after: Rank | None) -> Text:
    if after is None:
        return Text("")
    moved = before is None or before.rank != after.rank
    text = f"{before.rank if before else '-'} → {after.rank}" if moved else f"{after.rank}"
    standing = "" if after.standing == "ranked" else f" {after.standing}"
    return Text(text + standing, style="bold" if after.rank == 1 else "yellow" if moved else "")


def _reasons(night: Night) -> list[str]:
    """Why first ranks changed."""
    firsts = {(category, model) for category, *models in night.new_firsts for model in models}
    changes = [change for change in night.changes if (change.category, change.model) in firsts]
    return [
        f"{change.category}: {change.model} {change.place_before} → {change.place}: {change.reason}"
        for change in sorted(changes, key=lambda change: (change.category, change.place))[:MAX_REASONS]
    ]


def print_summary(story: Story, console: Console) -> None:
    """Totals of both sides, and what became of the models of the scenario."""
    title = f"{len(story.days)} days, the same prompts and conditions"
    table = Table("", *SIDES.values(), title=title, title_justify="left")
    totals = [story.totals(side) for side in SIDES]
    table.add_row("prompts", *(f"{one['tasks']:,}" for one in totals))
    table.add_row("good answers", *(f"{one['good']:.1%}" for one in totals))
    for category in CATEGORIES:
        table.add_row(f"  {category}", *(f"{one['good_by_category'][category]:.1%}" for one in totals))
    table.add_row("good answers, interactive", *(f"{one['good_asked']:.1%}" for one in totals))
    table.add_row("  median latency in seconds", *(f"{one['seconds']:.2f}" for one in totals))
    table.add_row("  USD per 1,000", *(f"{one['cost']:.3f}" for one in totals))
    table.add_row("failed calls", *(f"{one['failed']:.1%}" for one in totals))
    console.print()
    console.print(table)
    for line in summary_lines(story):
        print_line(line, console)


def summary_lines(story: Story) -> list[str]:
    """The summary's sentences."""
    (gain, error), (interactive, its_error) = story.gain(), story.gain(interactive_only=True)
    gains = (
        f"Learning changes good answers by {100 * gain:+.1f} ± {196 * error:.1f} points, interactive ones by"
        f" {100 * interactive:+.1f} ± {196 * its_error:.1f}."
    )
    overtaken = [_overtaken(story, event.model, event.first) for event in story.scenario.events[1:]]
    steps = [
        f"Night {night}: {line}" for night, line in story.discovery if any(step in line for step in STEPS)
    ]
    return [line for line in (gains, *_failing_lines(story), *overtaken, *steps) if line]


def _failing_lines(story: Story) -> list[str]:
    failing, days, last = story.failing, story.scenario.failing_days, story.days[-1].number
    if last < days.start:
        return []
    when = failing["reviews_until_off"]
    off = f"off the first rank at review {when} after that" if when else f"still first at night {last}"
    lines = [f"{FAILING} failed for technical prompts from day {days.start} to {days.stop - 1}: {off}."]
    if failing["shares"]:
        lines.append(
            f"After that it got at most {max(failing['shares']):.1%} of the prompts per day"
            f" (exploration: {story.scenario.learning().exploration.share:.0%}); without learning"
            f" {max(failing['shares_without']):.1%}."
        )
    if last >= days.stop:
        back = failing["reviews_until_back"]
        rank = f"first again at review {back} after that" if back else "not first again yet"
        lines.append(f"It recovered on day {days.stop}: {rank}.")
    return lines


def _overtaken(story: Story, model: str, since: int) -> str:
    if story.days[-1].number < since:
        return ""
    what = {SLOW: "became slow", DEAR: "became expensive"}[model]
    losses = [
        f"in {category} by {now} at night {night}"
        for night, category, before, now in story.new_firsts
        if before == model and night >= since
    ]
    if losses:
        return f"{model} {what} on day {since}: overtaken {', '.join(losses)}."
    before = story.days[since - 1].night.before
    was_first = any(ranking.get(model, UNRANKED).rank == 1 for ranking in before.values())
    return (
        f"{model} {what} on day {since}: {'not overtaken yet' if was_first else 'it was not first anywhere'}."
    )


def draw(story: Story, path: Path) -> None:
    """Write ranks by night for each category, and good answers by day; the suffix names the format."""
    import matplotlib as mpl  # noqa: PLC0415 - slow to import, and only this needs it

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415 - after the backend is chosen

    figure, axes = plt.subplots(2, 2, figsize=(12, 8))
    numbers = [day.number for day in story.days]
    for axis, category in zip(axes.flat, CATEGORIES, strict=False):
        nights = [story.days[0].night.before, *(day.night.after for day in story.days)]
        for model in sorted({model for night in nights for model in night.get(category, {})}):
            points = [
                (n, night[category][model].rank) for n, night in enumerate(nights) if model in night[category]
            ]
            axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=model)
        axis.invert_yaxis()
        axis.set(title=f"{category}: rank after each night", xlabel="night")
        axis.legend(fontsize=7)
    for name, title in SIDES.items():
        shares = [100 * share_good(day.sides[name].tasks) for day in story.days]
        axes[1][1].plot(numbers, shares, marker="o", markersize=3, label=title)
    axes[1][1].set(title="good answers, %", xlabel="day")
    axes[1][1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
