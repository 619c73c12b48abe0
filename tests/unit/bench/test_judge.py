"""The judge: each kind of breach by exactly one, and the valid case next to it."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from pathlib import Path

import pytest
from rich.console import Console

from bench.judge import Arrival, ModelVerdict, TargetChange, judge, print_verdict
from bench.judge.__main__ import main
from router.traffic import TrafficTarget

NANOSECOND = 1e-9


def call(
    at: float, seconds: float = 0.01, tokens: int = 0, used: int | None = None, name: str = ""
) -> Arrival:
    return Arrival(at, at + seconds, "m", name or f"at {at}", tokens, used, 200)


def target(line: str, at: float = 0.0, model: str = "m") -> TargetChange:
    return TargetChange(at, model, TrafficTarget.parse(line))


def verdict_on(
    arrivals: Iterable[Arrival], *changes: TargetChange, settle: float = 1.0, tokens: str = "corrected"
) -> ModelVerdict:
    verdict = judge(
        arrivals,
        changes,
        backlog_from=None,
        backlog_until=None,
        settle_seconds=settle,
        tokens=tokens,  # type: ignore[arg-type]
    )
    return verdict.models["m"]


def who_broke(verdict: ModelVerdict) -> list[str]:
    assert verdict.breach_count == len(verdict.breaches)
    return [breach.request_id for breach in verdict.breaches]


def test_one_request_too_many_is_one_breach():
    verdict = verdict_on([call(i / 10) for i in range(5)], target("4/min"))
    assert who_broke(verdict) == ["at 0.4"]
    assert (verdict.breaches[0].limit, verdict.breaches[0].count, verdict.breaches[0].allowed) == (
        "4/min",
        5,
        4,
    )
    assert verdict.worst_window_ratio == 1.25


def test_the_allowed_number_of_requests_is_no_breach():
    verdict = verdict_on([call(i / 10) for i in range(4)], target("4/min"))
    assert who_broke(verdict) == []
    assert verdict.worst_window_ratio == 1.0


@pytest.mark.parametrize("start", [0.0, 0.1, 86_400.7, 1_234_567.123456])
def test_a_window_is_half_open(start: float):
    first = call(start)
    exactly_later = call(start + 60, name="later")
    too_early = call(start + 60 - 2 * NANOSECOND, name="early")
    assert who_broke(verdict_on([first, exactly_later], target("1/min"))) == []
    assert who_broke(verdict_on([first, too_early], target("1/min"))) == ["early"]


def test_arrivals_at_the_same_time_count_one_by_one():
    verdict = verdict_on([call(1.0, name=str(i)) for i in range(3)], target("2/s"))
    assert who_broke(verdict) == ["2"]


def test_every_window_of_a_target_is_judged():
    steady = [call(i * 0.25) for i in range(12)]
    assert who_broke(verdict_on(steady, target("12/min, 4/s"))) == []
    assert [b.limit for b in verdict_on([*steady, call(2.9)], target("13/min, 4/s")).breaches] == ["4/s"]
    assert [b.limit for b in verdict_on([*steady, call(3.9)], target("12/min, 4/s")).breaches] == ["12/min"]


def test_arrivals_need_not_be_in_order():
    assert who_broke(verdict_on([call(30.0), call(59.0), call(0.0)], target("2/min"))) == ["at 59.0"]


def test_refused_calls_count_like_others():
    refused = call(0.5)._replace(status=429)
    assert who_broke(verdict_on([call(0.0), refused, call(1.0)], target("2/min"))) == ["at 1.0"]


def test_one_token_too_many_is_one_breach():
    calls = [call(0.0, 90, 600), call(1.0, 90, 400), call(2.0, 90, 1)]
    verdict = verdict_on(calls, target("1k tokens/min"))
    assert who_broke(verdict) == ["at 2.0"]
    assert verdict.worst_window_ratio == pytest.approx(1.001)
    assert who_broke(verdict_on(calls[:2], target("1k tokens/min"))) == []


def test_a_call_counts_with_what_it_used_once_it_has_ended():
    ended, next_call = call(0.0, 2, 900, used=300), call(2.0, 1, 700)
    assert who_broke(verdict_on([ended, next_call], target("1k tokens/min"))) == []
    assert who_broke(verdict_on([ended, next_call], target("1k tokens/min"), tokens="reserved")) == ["at 2.0"]
    still_running = ended._replace(ended_at=2.0 + 2 * NANOSECOND)
    assert who_broke(verdict_on([still_running, next_call], target("1k tokens/min"))) == ["at 2.0"]


def test_tokens_expire_at_the_windows_end_corrected_or_not():
    for seconds, used in ((1, 200), (1, None), (59.9, 900), (100, 10)):
        first = call(0.0, seconds, 1000, used=used)
        assert who_broke(verdict_on([first, call(60.0, 1, 1000)], target("1k tokens/min"))) == []
        assert who_broke(verdict_on([first, call(59.999, 1, 1000)], target("1k tokens/min"))) == ["at 59.999"]


def test_one_concurrent_call_too_many_is_one_breach():
    verdict = verdict_on([call(0.0, 10), call(1.0, 10), call(2.0, 10)], target("2 at once"))
    assert who_broke(verdict) == ["at 2.0"]
    assert verdict.breaches[0].limit == "2 at once"


def test_a_slot_is_free_at_the_time_a_call_ends():
    assert who_broke(verdict_on([call(0.0, 10), call(10.0, 1)], target("1 at once"))) == []
    assert who_broke(
        verdict_on([call(0.0, 10), call(10 - 2 * NANOSECOND, 1, name="x")], target("1 at once"))
    ) == ["x"]


def test_a_call_without_duration_counts():
    assert who_broke(verdict_on([call(1.0, 0), call(1.0, 0, name="x")], target("1 at once"))) == ["x"]


def test_a_call_without_an_end_occupies_its_slot():
    endless = call(0.0)._replace(ended_at=None)
    assert who_broke(verdict_on([endless, call(5000.0)], target("1 at once"))) == ["at 5000.0"]


def test_a_lowered_target_forbids_the_next_send_not_the_earlier_ones():
    before = [call(float(i)) for i in range(10)]
    changes = (target("10/min"), target("5/min", at=20.0))
    assert who_broke(verdict_on(before, *changes)) == []
    assert who_broke(verdict_on([*before, call(64.9)], *changes)) == [
        "at 64.9"
    ]  # 5 to 9 are still in the window
    assert who_broke(verdict_on([*before, call(65.0)], *changes)) == []


def test_a_raised_target_applies_from_its_change_on():
    changes = (target("2/min"), target("3/min", at=10.0))
    calls = [call(0.0), call(1.0)]
    assert who_broke(verdict_on([*calls, call(10.0)], *changes)) == []
    assert who_broke(verdict_on([*calls, call(9.9)], *changes)) == ["at 9.9"]


def test_an_arrival_during_settling_may_obey_either_target():
    changes = (target("3/min"), target("2/min", at=10.0))
    calls = [call(0.0), call(1.0)]
    assert who_broke(verdict_on([*calls, call(10.9)], *changes)) == []
    assert who_broke(verdict_on([*calls, call(11.0)], *changes)) == ["at 11.0"]
    assert who_broke(verdict_on([*calls, call(10.0)], *changes, settle=0)) == ["at 10.0"]


def test_an_arrival_during_settling_obeys_one_target_as_a_whole():
    changes = (target("2/min, 9 at once"), target("9/min, 2 at once", at=10.0))
    calls = [call(0.0, 60), call(1.0, 60), call(10.5, 60)]
    verdict = verdict_on(calls, *changes)
    assert who_broke(verdict) == ["at 10.5"]
    assert verdict.worst_window_ratio == 1.5


def test_several_changes_during_settling_all_count():
    changes = (target("3/min"), target("1/min", at=10.0), target("2/min", at=10.2))
    calls = [call(0.0), call(1.0)]
    assert who_broke(verdict_on([*calls, call(10.9)], *changes)) == []
    assert who_broke(verdict_on([*calls, call(11.1)], *changes)) == ["at 11.1"]


def test_a_stopped_model_may_be_sent_nothing():
    changes = (target("100/min"), target("0", at=10.0), target("100/min", at=20.0))
    verdict = verdict_on([call(5.0), call(10.5), call(15.0), call(20.0)], *changes)
    assert who_broke(verdict) == ["at 15.0"]
    assert (verdict.breaches[0].limit, verdict.worst_window_ratio) == ("stopped", 2.0)


def test_a_model_without_a_target_may_be_sent_nothing():
    assert who_broke(verdict_on([call(1.0), call(5.0)], target("9/min", at=2.0))) == ["at 1.0"]
    assert [breach.limit for breach in verdict_on([call(1.0)]).breaches] == ["no target yet"]


def test_models_do_not_share_their_windows():
    calls = [call(0.0), call(0.1)._replace(model="other")]
    verdict = judge(calls, [target("1/min"), target("1/min", model="other")], backlog_from=0, backlog_until=1)
    assert verdict.breach_count == 0
    assert {name: model.sent for name, model in verdict.models.items()} == {"m": 1, "other": 1}


@pytest.mark.parametrize("line", ["60/min", "600 tokens/min", "60 at once"])
def test_one_too_many_in_sixty_thousand_is_the_only_breach(line: str):
    full = [call(burst * 62 + i / 100, 30, 10) for burst in range(1000) for i in range(60)]
    assert who_broke(verdict_on(full, target(line))) == []
    one_more = call(700 * 62 + 0.6, 30, 10, name="one more")
    assert who_broke(verdict_on([*full, one_more], target(line))) == ["one more"]


def test_breaches_are_counted_past_those_that_are_listed():
    verdict = verdict_on([call(i / 1000) for i in range(1500)], target("1/min"))
    assert (verdict.breach_count, len(verdict.breaches)) == (1499, 1000)


def test_a_perfectly_paced_log_has_full_use():
    perfect = [call(minute * 60 + i * 0.9) for minute in range(5) for i in range(60)]
    verdict = judge(perfect, [target("60/min")], backlog_from=0.0, backlog_until=perfect[-1].at).models["m"]
    assert (verdict.use, verdict.worst_window_ratio, verdict.breach_count) == (1.0, 1.0, 0)


def test_use_is_real_sends_over_ideal_sends():
    lazy = [call(i * 2.0) for i in range(300)]
    verdict = judge(lazy, [target("60/min")], backlog_from=0.0, backlog_until=600 - 0.001).models["m"]
    assert verdict.ideal_sends == 600
    assert verdict.use == 0.5


def test_sends_before_the_backlog_count_in_the_ideals_windows():
    calls = [call(float(second)) for second in (*range(10), *range(60, 70))]
    verdict = judge(calls, [target("10/min, burst")], backlog_from=30.0, backlog_until=60.5).models["m"]
    assert (verdict.sent_in_backlog, verdict.ideal_sends, verdict.use) == (1, 1, 1.0)


def test_a_stopped_model_has_full_use():
    verdict = judge([], [target("0")], backlog_from=0.0, backlog_until=60.0).models["m"]
    assert (verdict.sent, verdict.use, verdict.worst_window_ratio) == (0, 1.0, 0.0)


def logs(folder: Path, arrivals: list[Arrival], targets: list[tuple[float, str, str]]) -> tuple[str, str]:
    door, history = folder / "arrivals.jsonl", folder / "targets.jsonl"
    door.write_text("".join(json.dumps(arrival._asdict()) + "\n" for arrival in arrivals))
    rows = [{"at_seconds": at, "model": model, "target": line} for at, model, line in targets]
    history.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(door), str(history)


def test_the_command_line_prints_json_and_exits_with_1_for_a_breach(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    paths = logs(tmp_path, [call(0.0), call(0.9), call(2.0)], [(0.0, "m", "2/min, burst")])
    assert main([*paths, "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    model = report["models"]["m"]
    assert (model["target"], model["sent"]) == ("2/min, burst", 3)
    assert (model["worst_window_ratio"], model["use"]) == (1.5, 1.5)
    assert model["breaches"][0]["request_id"] == "at 2.0"


def test_the_command_line_exits_with_0_without_a_breach(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    paths = logs(tmp_path, [call(0.0), call(2.0)], [(0.0, "m", "2/min")])
    assert main(list(paths)) == 0
    assert "2/min" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arrival", "change", "named"),
    [
        ("{", '{"at_seconds": 0, "model": "m", "target": "1/s"}', "arrivals.jsonl:1"),
        ('{"at": 1}', '{"at_seconds": 0, "model": "m", "target": "1/s"}', "model is missing"),
        ("[]", '{"at_seconds": 0, "model": "m", "target": "1/s"}', "arrivals.jsonl:1"),
        ('{"at": NaN, "model": "m"}', '{"at_seconds": 0, "model": "m", "target": "1/s"}', "arrivals.jsonl:1"),
        (
            '{"at": 1, "model": "m"}',
            '{"at_seconds": 0, "model": "m", "target": "1 fortnight"}',
            "targets.jsonl:1",
        ),
    ],
)
def test_an_invalid_line_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arrival: str, change: str, named: str
):
    (tmp_path / "arrivals.jsonl").write_text(arrival)
    (tmp_path / "targets.jsonl").write_text(change)
    assert main([str(tmp_path / "arrivals.jsonl"), str(tmp_path / "targets.jsonl")]) == 2
    assert named in capsys.readouterr().err


def test_a_call_without_a_model_is_ignored(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    nameless = {**call(0.0)._asdict(), "model": None}
    door, history = logs(tmp_path, [call(1.0)], [(0.0, "m", "2/min")])
    with Path(door).open("a") as log:
        log.write(json.dumps(nameless) + "\n")
    assert main([door, history, "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)["models"]) == ["m"]


def test_a_missing_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main([str(tmp_path / "none.jsonl"), str(tmp_path / "none.jsonl")]) == 2
    assert "none.jsonl cannot be read" in capsys.readouterr().err


def test_the_table_shows_models_and_breaches():
    text = io.StringIO()
    calls = [call(0.0), call(1.0, name="culprit")]
    print_verdict(
        judge(calls, [target("1/min")], backlog_from=None, backlog_until=None),
        Console(file=text, width=120),
    )
    assert "2 where 1/min allows 1" in text.getvalue()
    assert "culprit" in text.getvalue()
