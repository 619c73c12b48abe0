"""Benchmarks the nightly learning on real outcomes: tables of several models' answers to the same prompts.

    python bench/learning.py --outcomes FILE.csv.gz [--prompts FILE.jsonl.gz] [--json]

Each day draws prompts from the table. The router sends each prompt to the first model of its ranking,
except for exploration; it sees only that model's outcome, and `router.learning.ranking` re-ranks every
night. It is compared with a random model, the best single model, the best fixed model of each category and
of each topic (all chosen in hindsight), and an oracle that knows the best model of each prompt.

The days are then replayed with a shift: from the middle on, the first model of each category fails four of
five calls for five days. Confidence intervals (95 %) are bootstrapped from whole replays, each with its own
prompts and initial order.

Without --outcomes, all tables in $ROUTER_SHARED_DATA/outcomes are replayed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

if not __package__:  # run by its path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.learning_replay import Ints, Key, Replay, RouterReplay, Table, read_table, utilities
from router.errors import ConfigError
from router.settings import LearningSettings, load_config, load_learning

FAILING_DAYS = 5
RESAMPLES = 2000
COLUMNS = ("score", "usd", "worth", "regret")
PUBLIC = ("random", "best single", "best per category", "best per topic", "oracle")


@dataclass(frozen=True)
class Means:
    """Means per prompt of one policy in one replay."""

    score: float
    usd: float
    utility: float


def of_choice(table: Table, utility: NDArray[np.float64], prompts: Ints, choice: Ints) -> Means:
    """The means of a choice of models; -1 is a failed call."""
    answered = choice >= 0
    prompts, choice = prompts[answered], choice[answered]
    whole = len(answered)
    return Means(
        float(table.score[prompts, choice].sum() / whole),
        float(np.nan_to_num(table.cost[prompts, choice]).sum() / whole),
        float(utility[prompts, choice].sum() / whole),
    )


def in_hindsight(table: Table, utility: NDArray[np.float64], prompts: Ints, draw: Any) -> dict[str, Means]:
    """The policies to compare with; all but the first know the whole table."""
    groups = {
        "best single": np.zeros(len(table.key_of), dtype=np.int64),
        "best per category": np.array([table.categories.index(k.category) for k in table.keys])[table.key_of],
        "best per topic": table.key_of,
    }
    choices = {"random": draw.integers(len(table.models), size=len(prompts))}
    for name, group in groups.items():
        best = np.array([utility[group == n].mean(axis=0).argmax() for n in range(group.max() + 1)])
        choices[name] = best[group[prompts]]
    choices["oracle"] = utility[prompts].argmax(axis=1)
    return {name: of_choice(table, utility, prompts, choice) for name, choice in choices.items()}


def replay(table: Table, learning: LearningSettings, options: argparse.Namespace) -> dict[str, Any]:
    """Replays one table with one set of weights, and summarizes the replays."""
    utility = utilities(table, learning)
    means: dict[str, list[Means]] = {}
    steady: dict[str, list[dict[str, float]]] = {"router": [], "router, by topic": []}
    shifts: list[dict[str, float | None]] = []
    for seed in range(options.replays):
        draw = np.random.default_rng(1000 + seed)
        size = len(table.key_of)
        days = [
            draw.choice(size, min(options.prompts_a_day, size), replace=False) for _ in range(options.days)
        ]
        prompts = np.concatenate(days)
        for name, mean in in_hindsight(table, utility, prompts, draw).items():
            means.setdefault(name, []).append(mean)
        for name, topics in (("router", False), ("router, by topic", True)):
            done = RouterReplay(table, learning, topics=topics, seed=seed).run(days, lambda _day: {})
            means.setdefault(name, []).append(
                of_choice(table, utility, prompts, np.concatenate(done.choices))
            )
            settled = options.days // 2
            means.setdefault(f"{name}, later half", []).append(
                of_choice(
                    table, utility, np.concatenate(days[settled:]), np.concatenate(done.choices[settled:])
                )
            )
            steady[name].append(_steadiness(table, utility, days, done))
        shifts += _shift(table, learning, days, seed)
    return {
        "policies": {name: _policy(values, means["best per category"]) for name, values in means.items()},
        "steadiness": {name: _mean_of(values) for name, values in steady.items()},
        "shift": _shift_summary(shifts),
    }


def _steadiness(
    table: Table, utility: NDArray[np.float64], days: Sequence[Ints], done: Replay
) -> dict[str, float]:
    """How often the first model changes and returns, from the fifth review on; cost of exploration."""
    changes = returns = 0
    keys = list(done.first[0])
    for key in keys:
        firsts = [first[key] for first in done.first[4:]]
        moved = [n for n, (one, other) in enumerate(itertools.pairwise(firsts), 1) if one != other]
        changes += len(moved)
        returns += sum(firsts[n] in firsts[: n - 1] for n in moved)
    explored = np.concatenate(done.explored)
    prompts, choice = np.concatenate(days), np.concatenate(done.choices)
    topics = bool(keys[0].topic)
    firsts_of = [{}, *done.first[:-1]]
    lost = 0.0
    for day, first, choices, mask in zip(days, firsts_of, done.choices, done.explored, strict=True):
        for n in np.flatnonzero(mask):
            key = table.keys[table.key_of[day[n]]]
            regular = first[key if topics else Key(key.category)]
            lost += utility[day[n], regular] - (utility[day[n], choices[n]] if choices[n] >= 0 else 0.0)
    reviews = max(1, len(done.first) - 5) * len(keys)
    return {
        "first_place_changes_per_100_nights": 100 * changes / reviews,
        "first_place_returns_per_100_nights": 100 * returns / reviews,
        "explored_share": float(explored.mean()),
        "worth_lost_by_exploring_per_prompt": lost / len(prompts),
        "unanswered": float((choice < 0).mean()),
    }


def _shift(
    table: Table, learning: LearningSettings, days: Sequence[Ints], seed: int
) -> list[dict[str, float | None]]:
    """The reaction to the first model of each category failing for some days, from the middle on."""
    begins = len(days) // 2
    run = RouterReplay(table, learning, topics=False, seed=seed)
    victims: dict[str, int] = {}

    def failing(day: int) -> dict[str, int]:
        if day == begins:
            victims.update({key.category: first for key, first in run.replay.first[-1].items()})
        return victims if begins <= day < begins + FAILING_DAYS else {}

    done = run.run(days, failing)
    found: list[dict[str, float | None]] = []
    for category, victim in victims.items():
        firsts = [first[Key(category)] for first in done.first]
        away = next((n for n in range(begins, len(firsts)) if firsts[n] != victim), None)
        ends = begins + FAILING_DAYS
        back = next((n for n in range(ends, len(firsts)) if (Key(category), victim) not in done.low[n]), None)
        of_category = np.array([key.category == category for key in table.keys])[table.key_of]
        share = [
            float(np.isin(done.sent[d][of_category[days[d]]], [victim]).mean())
            for d in range(begins + 1, min(ends, len(days)))
        ]
        found.append({
            "nights_until_followed": None if away is None else away - begins + 1,
            "nights_until_trusted_again": None if back is None else back - ends + 1,
            "largest_share_while_failing": max(share, default=None),
        })  # fmt: skip
    return found


def _shift_summary(shifts: Sequence[dict[str, float | None]]) -> dict[str, Any]:
    summary: dict[str, Any] = {"cases": len(shifts)}
    for name in ("nights_until_followed", "nights_until_trusted_again", "largest_share_while_failing"):
        values = [value for shift in shifts if (value := shift[name]) is not None]
        summary[name] = {
            "median": float(np.median(values)) if values else None,
            "worst": max(values, default=None),
            "never": sum(shift[name] is None for shift in shifts),
        }
    return summary


def _policy(values: Sequence[Means], best_fixed: Sequence[Means]) -> dict[str, Any]:
    regret = [best.utility - own.utility for own, best in zip(values, best_fixed, strict=True)]
    columns = {
        "score": [mean.score for mean in values],
        "usd": [mean.usd for mean in values],
        "worth": [mean.utility for mean in values],
        "regret": regret,
    }
    return {name: _interval(column) for name, column in columns.items()}


def _interval(values: Sequence[float]) -> dict[str, float]:
    draw = np.random.default_rng(7)
    sample = np.array(values)
    means = sample[draw.integers(len(sample), size=(RESAMPLES, len(sample)))].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return {"mean": float(sample.mean()), "low": float(low), "high": float(high)}


def _mean_of(values: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([value[name] for value in values])) for name in values[0]}


def weightings() -> dict[str, LearningSettings]:
    """The shipped weights, and quality only."""
    shipped = load_learning(None, load_config().categories).model_copy(update={"categories": {}})
    alone = {"success": 0.0, "score": 1.0, "latency": 0.0, "cost": 0.0}
    quality = shipped.model_copy(update={"utility": shipped.utility.model_copy(update=alone)})
    return {"shipped weights": shipped, "quality alone": quality}


def show(name: str, weights: str, table: Table, result: dict[str, Any]) -> None:
    print(
        f"\n{name}: {len(table.key_of):,} prompts, {len(table.models)} models, {len(table.keys)} topics;"
        f" {weights}"
    )
    print(f"  {'policy':30} {'score':>22} {'USD per 1k':>12} {'utility':>22} {'regret':>24}")
    for policy, row in result["policies"].items():
        spans = {
            column: f"{row[column]['mean']:.4f} [{row[column]['low']:.4f} {row[column]['high']:.4f}]"
            for column in COLUMNS
        }
        usd = f"{1000 * row['usd']['mean']:.3f}" if row["usd"]["mean"] else "-"
        print(f"  {policy:30} {spans['score']:>22} {usd:>12} {spans['worth']:>22} {spans['regret']:>24}")
    for policy, row in result["steadiness"].items():
        print(
            f"  {policy}: first place changed {row['first_place_changes_per_100_nights']:.2f} and returned"
            f" {row['first_place_returns_per_100_nights']:.2f} times in 100 reviews of a key; explored"
            f" {row['explored_share']:.1%}, which cost"
            f" {row['worth_lost_by_exploring_per_prompt']:.5f} of utility per prompt"
        )
    shift = result["shift"]
    for what in ("nights_until_followed", "nights_until_trusted_again", "largest_share_while_failing"):
        row = shift[what]
        print(
            f"  {what.replace('_', ' ')}: median {row['median']}, worst {row['worst']},"
            f" never {row['never']} of {shift['cases']}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--outcomes", type=Path, action="append", default=[], metavar="FILE.csv.gz")
    parser.add_argument("--prompts", type=Path, action="append", default=[], metavar="FILE.jsonl.gz")
    parser.add_argument("--days", type=int, default=40)
    parser.add_argument("--prompts-a-day", type=int, default=1000)
    parser.add_argument("--replays", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    files = options.outcomes or _shared()
    prompts = options.prompts if options.outcomes else [_prompts_of(path) for path in files]
    results: dict[str, Any] = {}
    for path, texts in itertools.zip_longest(files, prompts):
        table = read_table(path, texts)
        for weights, learning in weightings().items():
            result = replay(table, learning, options)
            results.setdefault(table.name, {})[weights] = result
            if not options.json:
                show(table.name, weights, table, result)
    if options.json:
        print(json.dumps(results, indent=2))


def _shared() -> list[Path]:
    folder = Path(os.environ.get("ROUTER_SHARED_DATA", ""), "outcomes")
    found = sorted(folder.glob("*.csv.gz")) if os.environ.get("ROUTER_SHARED_DATA") else []
    if not found:
        print("No outcomes: give --outcomes FILE.csv.gz, or set ROUTER_SHARED_DATA.", file=sys.stderr)
    return found


def _prompts_of(path: Path) -> Path | None:
    texts = path.with_name(path.name.replace(".csv.gz", ".prompts.jsonl.gz"))
    return texts if texts.exists() else None


if __name__ == "__main__":
    try:
        main()
    except (ConfigError, OSError, KeyError, ValueError) as error:
        sys.exit(f"bench/learning.py: {error}")
