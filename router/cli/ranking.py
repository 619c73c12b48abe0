"""The command `router ranking`: the models of each category in order, with reasons and history."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated, Any

import typer
from rich.text import Text

from router.cli import terminal
from router.database import Connection, rows
from router.errors import RouterError
from router.learning import RankChange, Standing

Category = Annotated[
    str | None, typer.Option("--category", "-c", metavar="CATEGORY", help="Show only this category.")
]


RANKING_HELP = """
Show model rankings.

Shows the models of each category in order, or with --history the changes of past reviews. The nightly review
ranks the models by the call log. A new model keeps its rank until it has enough calls. A model below the
floor or on probation gets only a bounded share of the tasks.

\b
Examples:
  router ranking
  router ranking --category technical --history
  router ranking explain llama-3.3-70b general
  router ranking undo
"""
EXPLAIN_HELP = """
Explain a model's rank in a category.

\b
Examples:
  router ranking explain llama-3.3-70b general
"""
UNDO_HELP = """
Undo the last review that changed a rank.

The nightly review then keeps the restored ranking for some periods (undo_periods in config/learning.yaml).
"""
ranking = terminal.verbs(help=RANKING_HELP, invoke_without_command=True)


@ranking.callback(help=RANKING_HELP)
def _ranking(
    context: typer.Context,
    *,
    category: Category = None,
    history: Annotated[bool, typer.Option("--history", help="Show changes of past reviews.")] = False,
    as_json: terminal.Json = False,
    database: terminal.Database = None,
) -> None:
    if context.invoked_subcommand is not None:
        return
    with terminal.database(database) as connection:
        if category is not None:
            terminal.known(category, _categories(connection), "category")
        if history:
            _show_history(_history(connection, category), as_json=as_json)
        else:
            _show_order(_order(connection, category), as_json=as_json)


def _categories(connection: Connection) -> list[str]:
    return [row["name"] for row in rows(connection, "SELECT name FROM categories ORDER BY name")]


def _order(connection: Connection, category: str | None) -> list[dict[str, Any]]:
    return rows(
        connection,
        "SELECT k.category, k.model, k.place, o.state, k.standing, k.quality, k.least_share, k.most_share,"
        " k.review, p.reason, p.evidence"
        " FROM rankings k JOIN roster o USING (model) JOIN categories c ON c.name = k.category"
        " LEFT JOIN review_places p ON p.review = k.review AND p.category = k.category AND p.model = k.model"
        " WHERE o.state <> 'retired' AND (%s::text IS NULL OR k.category = %s)"
        " ORDER BY k.category, k.place, k.model",
        (category, category),
    )


def _show_order(found: list[dict[str, Any]], *, as_json: bool) -> None:
    if as_json:
        by_category: dict[str, list[dict[str, Any]]] = {}
        for row in found:
            by_category.setdefault(row.pop("category"), []).append(row)
        terminal.print_json(by_category)
        return
    for category in dict.fromkeys(row["category"] for row in found):
        terminal.out().print(Text(f"\n{category}", style="bold"))
        numbers = ("rank", "max share", "bound", "answered", "score", "seconds", "USD per call", "calls")
        table = terminal.quiet_table("rank", "model", "standing", *numbers[1:], right=numbers)
        for row in found:
            if row["category"] == category:
                share = f"{row['most_share']:.1%}" if row["most_share"] < 1 else ""
                figures = _figures(row["evidence"])
                table.add_row(str(row["place"]), row["model"], _standing(row), share, *figures)
        terminal.out().print(table)


def _standing(row: dict[str, Any]) -> Text:
    if row["state"] != "active" and row["state"] != "probation":
        return Text(row["state"], style="dim")
    if row["review"] is None:
        return Text("as configured", style="dim")
    return Text(Standing(row["standing"]).label, style="yellow" if row["most_share"] < 1 else "")


def _figures(evidence: dict[str, Any] | None) -> list[str]:
    if not evidence:
        return ["-"] * 6
    return [
        f"{evidence['bound']:.3f}", f"{evidence['success']:.1%}", f"{evidence['score']:.3f}",
        f"{evidence['seconds']:.1f}", f"{evidence['cost_usd']:.5f}", f"{evidence['calls']:,.0f}",
    ]  # fmt: skip


def _history(connection: Connection, category: str | None) -> list[dict[str, Any]]:
    reviews = rows(
        connection,
        "SELECT review, kind, at, by, moved, undoes, undone_by, notes FROM reviews"
        " ORDER BY review DESC LIMIT 50",
    )
    moves = rows(
        connection,
        "SELECT review, category, model, place_before, place, before ->> 'standing' AS standing_before,"
        " standing, reason, evidence FROM review_places WHERE review = ANY (%s)"
        " AND (%s::text IS NULL OR category = %s) ORDER BY review, category, place",
        ([row["review"] for row in reviews], category, category),
    )
    for review in reviews:
        own = [move for move in moves if move["review"] == review["review"]]
        review["moves"] = [move for move in own if _change(move).changed]
    return reviews


def _change(row: dict[str, Any]) -> RankChange:
    return RankChange(**{name: row[name] for name in RankChange.__slots__})


def _show_history(reviews: list[dict[str, Any]], *, as_json: bool) -> None:
    if as_json:
        terminal.print_json(reviews)
        return
    if not reviews:
        typer.echo("No review yet; the ranks are those of config/models.yaml.")
    for review in reviews:
        what = f"undo of {review['undoes']}" if review["undoes"] else review["kind"]
        undone = f", undone by {review['undone_by']}" if review["undone_by"] else ""
        head = f"{review['review']}  {review['at']:%Y-%m-%d %H:%M}  {what} by {review['by']}{undone}"
        terminal.out().print(Text(f"\n{head}", style="bold"))
        for move in review["moves"]:
            typer.echo(f"  {_change(move)}")
        for note in review["notes"]:
            typer.echo(f"  {note}")
        if not review["moves"]:
            typer.echo("  no changes")


@ranking.command(help=EXPLAIN_HELP)
def explain(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Name of the model.")],
    category: Annotated[str, typer.Argument(metavar="CATEGORY", help="Name of the category.")],
    *,
    as_json: terminal.Json = False,
    database: terminal.Database = None,
) -> None:
    with terminal.database(database) as connection:
        terminal.known(category, _categories(connection), "category")
        order = _order(connection, category)
        terminal.known(model, [row["model"] for row in order], f"model ranked for {category}:")
        (row,) = [row for row in order if row["model"] == model]
        about = rows(connection, "SELECT * FROM reviews WHERE review = %s", (row["review"],))
    review = about[0] if about else None
    if as_json:
        terminal.print_json(
            {**row, "reviewed_at": review and review["at"], "settings": review and review["settings"]}
        )
        return
    typer.echo(f"{model} has rank {row['place']} of {len(order)} for {category}.")
    if review is None or not row["evidence"]:
        typer.echo("No review has ranked it; the rank is that of config/models.yaml.")
        return
    typer.echo(
        f"Review {review['review']} of {review['at']:%Y-%m-%d %H:%M}, by {review['by']}: {row['reason']}."
    )
    for line in _explained(row, review):
        typer.echo(f"  {line}")


def _explained(row: dict[str, Any], review: dict[str, Any]) -> list[str]:
    e, settings = row["evidence"], review["settings"]
    utility = {**settings["utility"], **settings["categories"].get(row["category"], {})}
    grades = ", ".join(f"{g['mean']:.2f} by {g['answers']:.0f} of {s}" for s, g in e["grades"].items())
    fast = 1 / (1 + e["seconds"] / utility["latency_seconds"])
    cheap = 1 / (1 + e["cost_usd"] / utility["cost_usd"])
    bound = f": bound {e['bound']:.3f}"
    lines = [
        f"calls     {e['calls']:,.0f} effective{_since(e, review)}",
        f"answered  {e['success']:.1%} (+-{e['success_error']:.1%})",
        f"score     {e['score']:.3f} (+-{e['score_error']:.3f}), weight {utility['score']:g}"
        + (f": {grades}" if grades else ": no answer graded, prior used"),
        f"seconds   {e['seconds']:.2f}: fast is {fast:.2f}, weight {utility['latency']:g}",
        f"USD       {e['cost_usd']:.6f} per call: cheap is {cheap:.2f}, weight {utility['cost']:g}",
        f"utility   {e['worth']:.3f}, minus {settings['bound_errors']:g} x {e['error']:.3f}" + bound,
    ]
    if row["most_share"] < 1 or row["least_share"] > 0:
        most = "unbounded" if row["most_share"] >= 1 else f"at most {row['most_share']:.2%}"
        lines.append(f"share     at least {row['least_share']:.2%} of the category's tasks, {most}")
    return lines


def _since(evidence: dict[str, Any], review: dict[str, Any]) -> str:
    if evidence["since_period"] is None:
        return ""
    back = timedelta(seconds=review["period_seconds"]) * (review["period"] - evidence["since_period"] + 1)
    dropped = "; older ones were dropped after a change" if evidence["forgot_before_period"] else ""
    return f", of the last {back}{dropped}"


@ranking.command(help=UNDO_HELP)
def undo(
    *, by: terminal.By = None, as_json: terminal.Json = False, database: terminal.Database = None
) -> None:
    with terminal.database(database) as connection:
        done = rows(connection, "SELECT review, undone FROM undo_review(%s)", (terminal.who(by),))[0]
    if done["undone"] is None:
        raise RouterError("No review to undo: none has changed a rank, or all were undone.")
    if as_json:
        terminal.print_json(done)
    else:
        typer.echo(
            f"Review {done['undone']} was undone by {done['review']}; workers apply it within a second."
        )
