"""Progress of a search: its log is bounded, and its counts are those of the trials."""

from __future__ import annotations

import pytest

from router.discovery import progress as module
from router.discovery.progress import SearchProgress


def test_an_hour_of_calls_is_summarized_in_few_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    lines: list[str] = []
    progress = SearchProgress(lines.append, _began=0.0, _summary_at=5.0)
    for model in ("first", "second"):
        progress.expect("general", model, "candidate", 3600)
    for _ in range(3600):
        now += 1.0
        for model in ("first", "second"):
            progress.called("general", model, answered=model == "first")
    assert lines[0] == "general: first 5/3600, second 4/3600 (4 failed)"
    assert len(lines) < 70
    assert progress.as_json()["calls"] == progress.as_json()["of"] == 7200


def test_a_stopped_trial_counts_with_the_calls_that_it_made() -> None:
    lines: list[str] = []
    progress = SearchProgress(lines.append)
    progress.expect("general", "broken", "candidate", 30)
    progress.called("general", "broken", answered=False)
    progress.stop("general", "broken")
    progress.decided("general", "broken", "not admitted", "it fails")
    stored = progress.as_json()
    assert (stored["calls"], stored["of"]) == (1, 1)
    assert stored["trials"][0]["verdict"] == "not admitted"
    assert lines == ["general: broken: not admitted: it fails"]
