"""`bench/learning.py`, run by its path on a small table."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

from router.settings.environment import ROOT


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
