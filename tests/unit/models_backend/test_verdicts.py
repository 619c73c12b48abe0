"""The stand-in as a judging model: verdicts follow the answers and parse with the router's grader."""

from __future__ import annotations

import pytest

from models_backend.answers import compose_answer
from models_backend.verdicts import verdict_on
from router.learning.grading import Judgment, Result, judge_prompts, parse_verdict

REQUEST = "Explain how a balanced search tree keeps its height small while rows are inserted"
MODELS = ("phi-4", "llama-3.1-8b", "command-r-plus", "qwen-2.5-72b")


def judged(one: str, other: str, *, looks_well: bool = True) -> Result | None:
    straight, swapped = (
        parse_verdict(verdict_on(question, looks_well=looks_well) or "")
        for question in judge_prompts(REQUEST, one, other)
    )
    return Judgment(straight, swapped).result


def answers(flaw: str | None) -> list[str]:
    composed = [compose_answer(model, REQUEST, seed=seed) for model in MODELS for seed in range(60)]
    return [answer.text for answer in composed if answer.flaw == flaw]


@pytest.mark.parametrize("flaw", ["empty", "cut off", "refusal", "loop", "off topic"])
def test_a_good_answer_wins_against_a_flawed_one(flaw: str) -> None:
    good = answers(None)[0]
    flawed = answers(flaw)
    assert flawed
    wins = [judged(good, bad) for bad in flawed]
    assert wins.count(Result.WIN) >= 0.9 * len(wins)
    assert judged(flawed[0], good) is not Result.WIN


def test_two_good_answers_tie_and_a_bad_verdict_prefers_the_first() -> None:
    one, other = answers(None)[:2]
    assert judged(one, other) is Result.TIE
    assert judged(one, "", looks_well=False) is Result.TIE  # the same in both orders


def test_other_prompts_get_ordinary_answers() -> None:
    assert verdict_on(REQUEST, looks_well=True) is None
    assert verdict_on("What does 'verdict: tie' mean?", looks_well=True) is None


def test_a_judging_model_returns_a_verdict() -> None:
    question, _ = judge_prompts(REQUEST, answers(None)[0], "")
    said = [compose_answer(model, question, seed=1).text for model in MODELS]
    assert all(parse_verdict(text) is not None for text in said)
