"""`bench/learning.py`, run by its path on a small table."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.learning_replay import topic_prior
from router.learning.evidence import Evidence, Moments, PeriodStats, decayed
from router.learning.utility import category_prior, estimate_utility
from router.settings.environment import ROOT
from router.settings.learning import load_learning
from router.settings.router import load_config


def test_a_small_table_is_replayed(tmp_path: Path) -> None:
    outcomes, prompts = tmp_path / "small.csv.gz", tmp_path / "small.prompts.jsonl.gz"
    lines = ["table,prompt_id,category,subject,model,score,correct,cost_usd"]
    for number in range(300):
        for model, good in (("strong", number % 10 > 0), ("weak", number % 3 == 0)):
            lines.append(f"small,p{number},general,s{number % 2},{model},{float(good)},{int(good)},0.001")
    outcomes.write_bytes(gzip.compress("\n".join(lines).encode()))
    texts = [json.dumps({"prompt_id": f"p{n}", "prompt": "?"}) for n in range(299)]  # one is not known
    prompts.write_bytes(gzip.compress("\n".join(texts).encode()))
    done = subprocess.run(
        [sys.executable, ROOT / "bench" / "learning.py", "--outcomes", outcomes, "--prompts", prompts,
         "--json", "--days", "12", "--prompts-a-day", "200", "--replays", "2"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    policies = json.loads(done.stdout)["small"]["quality alone"]["policies"]
    oracle = policies["oracle"]["score"]["mean"]
    assert all(policy["score"]["mean"] <= oracle for policy in policies.values())
    assert policies["router, later half"]["score"]["mean"] > policies["random"]["score"]["mean"]
    shift = json.loads(done.stdout)["small"]["quality alone"]["shift"]
    assert shift["nights_until_followed"]["worst"] == 1


def scored(calls: int, score: float) -> Evidence:
    scores = {"check": Moments.of(calls, calls * score, calls * score**2)}
    stats = PeriodStats(0, calls, calls * 0.98, Moments(), Moments(), scores)
    return decayed([stats], 0, half_life=7, memory=28, change_errors=4)


def test_a_topic_is_shrunk_towards_its_category() -> None:
    learning = load_learning(None, load_config().categories)
    settings, sources = learning.utility_of("general"), learning.grading.sources
    in_category = scored(1000, 0.9)
    prior = category_prior([in_category], settings, learning.prior_calls)
    of_topic = topic_prior(in_category, prior, calls=30)
    whole = estimate_utility(in_category, prior, settings, sources, 1)
    empty = estimate_utility(Evidence(), of_topic, settings, sources, 1)
    thin = estimate_utility(scored(5, 0.2), of_topic, settings, sources, 1)
    assert empty.mean == pytest.approx(whole.mean, abs=0.02)
    assert whole.mean * 0.7 < thin.mean < empty.mean
