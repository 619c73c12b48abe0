"""How the demo of learning is told in a terminal: a table a night, and what it all came to."""

from __future__ import annotations

import re
import textwrap

from rich.console import Console
from rich.status import Status
from rich.table import Table
from rich.text import Text

from bench.learning_demo.cast import CATEGORIES, DEAR, FAILING, SLOW
from bench.learning_demo.night import Night, Stands
from bench.learning_demo.script import Script
from bench.learning_demo.side import SideDay, share_good
from bench.learning_demo.story import NAMES, SIDES, Day, Story
from router.learning import RankChange
from router.learning.review import BOUNDED

MOST_REASONS = 6
LAST = Stands(10**6, "", "")
VERDICT = re.compile(r" (lost|taken|promoted|retired): ")
WORDS = {"low": "low", "trial": "trial", "young": "young"}


class Teller:
    """Tells day after day; on a terminal also how far a day is."""

    def __init__(self, console: Console, script: Script) -> None:
        self._console = console
        self._script = script
        self._status: Status | None = None

    def morning(self, day: int, news: list[str]) -> None:
        """What is different today."""
        self.quiet()
        head = Text(f"\nDay {day} of {self._script.days}", style="bold")
        self._console.print(head)
        for line in news:
            self._print(line, "yellow")

    def going(self, what: str) -> None:
        """How far it is; shown in passing on a terminal, and nowhere else."""
        if not self._console.is_terminal:
            return
        if self._status is None:
            self._status = self._console.status(what)
            self._status.start()
        self._status.update(what)

    def quiet(self) -> None:
        """Take away what was shown in passing."""
        if self._status is not None:
            self._status.stop()
            self._status = None

    def night(self, day: Day) -> None:
        """The day's answers, and the ranking before and after the night."""
        self.quiet()
        for name in SIDES:
            self._console.print(Text(f"  {NAMES[name]:13}  {_answers(day.sides[name])}"))
        self._console.print(_ranking(day.number, day.night))
        for line in _reasons(day.night):
            self._print(line)
        for line in day.night.searched:
            self._print(f"search: {line}", "cyan")

    def _print(self, line: str, style: str = "") -> None:
        """Indented, and where it is longer than the terminal is wide, its second line more so."""
        wide = max(20, self._console.width - 4)
        first, *others = textwrap.wrap(line, wide, break_long_words=False) or [""]
        self._console.print(Text("\n".join([f"  {first}", *(f"    {other}" for other in others)]), style))

    def summary(self, story: Story) -> None:
        """What all days came to."""
        self.quiet()
        self._console.print()
        self._console.print(_totals(story))
        for line in summary_lines(story):
            self._print(line)


def _answers(side: SideDay) -> str:
    asked = [task for task in side.tasks if task.asked]
    waits = sorted(task.seconds for task in asked if task.seconds is not None)
    wait = f" after {waits[len(waits) // 2]:.2f} s" if waits else ""
    return f"{side.good:6.1%} good answers; to what was asked {share_good(asked):6.1%}{wait}"


def _ranking(day: int, night: Night) -> Table:
    table = Table(title=f"Night {day}: places before and after", title_justify="left", expand=False)
    table.add_column("model", no_wrap=True)
    for category in CATEGORIES:
        table.add_column(category, no_wrap=True, min_width=14)
    models = sorted({model for order in night.after.values() for model in order})
    for model in models:
        cells = []
        for category in CATEGORIES:
            before = night.before.get(category, {}).get(model)
            after = night.after.get(category, {}).get(model)
            cells.append(_cell(before, after))
        table.add_row(model, *cells)
    return table


def _cell(before: Stands | None, after: Stands | None) -> Text:
    if after is None:
        return Text("")
    word = WORDS.get(after.standing, "")
    moved = before is None or before.place != after.place
    text = f"{before.place if before else '-'} → {after.place}" if moved else f"{after.place}"
    style = "bold" if after.place == 1 else ("yellow" if moved else "")
    return Text(f"{text} {word}".rstrip(), style=style)


def _reasons(night: Night) -> list[str]:
    """Why first places changed hands, and who is bounded now or no longer."""
    firsts = {(category, model) for category, *models in night.new_firsts for model in models}
    told = [move for move in night.moves if (move.category, move.model) in firsts or _unbound(move)]
    told.sort(key=lambda move: (move.category, move.place))
    lines = [
        f"{move.category}: {move.model} {move.place_before} → {move.place}: {move.reason}" for move in told
    ]
    more = [f"... and {len(lines) - MOST_REASONS} more"] if len(lines) > MOST_REASONS else []
    return lines[:MOST_REASONS] + more


def _unbound(move: RankChange) -> bool:
    return (move.standing in BOUNDED) != (move.standing_before in BOUNDED)


def _totals(story: Story) -> Table:
    table = Table(
        title=f"{len(story.days)} days, the same prompts and the same weather", title_justify="left"
    )
    table.add_column("")
    for name in SIDES:
        table.add_column(NAMES[name], justify="right")
    totals = {name: story.totals(name) for name in SIDES}

    def row(words: str, *values: str) -> None:
        table.add_row(words, *values)

    row("prompts", *(f"{totals[name].tasks:,}" for name in SIDES))
    row("good answers", *(f"{totals[name].good:.1%}" for name in SIDES))
    for category in CATEGORIES:
        row(f"  {category}", *(f"{totals[name].good_by_category[category]:.1%}" for name in SIDES))
    row("good answers to prompts that were asked", *(f"{totals[name].good_asked:.1%}" for name in SIDES))
    row("  seconds until answered, median", *(f"{totals[name].seconds:.2f}" for name in SIDES))
    row("  USD a thousand", *(f"{totals[name].cost:.3f}" for name in SIDES))
    row("calls that failed", *(f"{totals[name].failed:.1%}" for name in SIDES))
    return table


def summary_lines(story: Story) -> list[str]:
    """What is to be said beside the table, a line each."""
    gain, error = story.gain()
    asked, asked_error = story.gain(asked=True)
    gained = (
        f"With learning {100 * gain:+.1f} ± {196 * error:.1f} points of good answers,"
        f" {100 * asked:+.1f} ± {196 * asked_error:.1f} of those that were asked."
    )
    lines = [
        gained,
        *_failing_lines(story),
        _overtaken(story, SLOW, story.script.slow_from, "became slow"),
        _overtaken(story, DEAR, story.script.dear_from, "became dear"),
    ]
    lines += [f"Night {night}: {line}" for night, line in story.searched if VERDICT.search(line)]
    return [line for line in lines if line]


def _failing_lines(story: Story) -> list[str]:
    failing, days = story.failing, story.script.failing_days
    if story.days[-1].number < days.start:
        return []
    off = (
        f"not off its first place by night {story.days[-1].number}"
        if failing.reviews_until_off is None
        else f"off its first place at review {failing.reviews_until_off} after that"
    )
    lines = [f"{FAILING} failed for technical from day {days.start} to {days.stop - 1}: {off}."]
    if failing.shares:
        most, share = max(failing.shares), story.script.learning().exploration.share
        without = max(failing.shares_without)
        lines.append(
            f"From then on it got at most {most:.1%} of them a day (exploration: {share:.0%});"
            f" without learning {without:.1%}."
        )
    if story.days[-1].number >= days.stop:
        back = failing.reviews_until_back
        lines.append(
            f"Well again from day {days.stop}: "
            + ("not back yet." if back is None else f"first again at review {back} after that.")
        )
    return lines


def _overtaken(story: Story, model: str, since: int, what: str) -> str:
    if story.days[-1].number < since:
        return ""
    lost = [(night, category, now) for night, category, before, now in story.new_firsts
            if before == model and night >= since]  # fmt: skip
    if not lost:
        order = story.days[since - 1].night.before
        was_first = any(stands.get(model, LAST).place == 1 for stands in order.values())
        why = "nobody has overtaken it yet" if was_first else "it was first nowhere by then"
        return f"{model} {what} on day {since}: {why}."
    places = ", ".join(f"in {category} by {now} at night {night}" for night, category, now in lost)
    return f"{model} {what} on day {since}: overtaken {places}."
