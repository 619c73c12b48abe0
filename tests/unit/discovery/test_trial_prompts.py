"""Trial prompts: the shipped ones, and invalid files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from router.classification.examples import read_examples
from router.discovery.trial_prompts import TrialPrompt, read_trial_prompts
from router.errors import ConfigError
from router.learning.grading import against_reference
from router.settings.classification import load_categories
from router.settings.environment import DEFAULT_CONFIG_FOLDER
from router.settings.router import load_config

CATEGORIES = load_config().categories
RUN = 6  # consecutive words that two prompts would not share by chance


def words_of(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def runs_of(text: str) -> set[tuple[str, ...]]:
    words = words_of(text)
    return {tuple(words[at : at + RUN]) for at in range(len(words) - RUN + 1)}


@pytest.mark.parametrize("category", CATEGORIES)
def test_there_are_enough_prompts_and_none_is_a_training_example(category: str) -> None:
    prompts = read_trial_prompts(DEFAULT_CONFIG_FOLDER, category)
    assert 24 <= len(prompts) <= 40
    examples = read_examples(load_categories())
    whole = {tuple(words_of(example.prompt)) for example in examples}
    runs = set().union(*(runs_of(example.prompt) for example in examples))
    for prompt in prompts:
        assert tuple(words_of(prompt.prompt)) not in whole
        shared = runs_of(prompt.prompt) & runs
        assert len(shared) <= len(runs_of(prompt.prompt)) // 4, (prompt.prompt, shared)


def test_categories_share_no_prompt() -> None:
    prompts = [
        prompt for category in CATEGORIES for prompt in read_trial_prompts(DEFAULT_CONFIG_FOLDER, category)
    ]
    assert len({" ".join(words_of(prompt.prompt)) for prompt in prompts}) == len(prompts)


@pytest.mark.parametrize("category", CATEGORIES)
def test_an_answer_with_the_reference_scores_1_and_another_does_not(category: str) -> None:
    for prompt in read_trial_prompts(DEFAULT_CONFIG_FOLDER, category):
        if prompt.reference is not None:
            assert against_reference(f"It is {prompt.reference}", prompt.reference).score == 1
            assert against_reference("Nobody knows that for sure", prompt.reference).score < 0.5


def test_references_per_category() -> None:
    share = {
        category: sum(prompt.reference is not None for prompt in prompts) / len(prompts)
        for category in CATEGORIES
        for prompts in [read_trial_prompts(DEFAULT_CONFIG_FOLDER, category)]
    }
    assert share["technical"] > 0.6
    assert share["general"] > 0.5
    assert share["creative"] == 0


def written(folder: Path, text: str) -> Path:
    (folder / "trials").mkdir()
    (folder / "trials" / "general.jsonl").write_text(text, encoding="utf-8")
    return folder


def test_the_config_folder_takes_precedence_over_the_shipped_file(tmp_path: Path) -> None:
    shipped = read_trial_prompts(tmp_path, "general")
    assert shipped == read_trial_prompts(DEFAULT_CONFIG_FOLDER, "general")
    written(tmp_path, '{"prompt": "Why?"}\n\n{"prompt": "2 + 2?", "reference": "4"}\n')
    assert read_trial_prompts(tmp_path, "general") == (TrialPrompt("Why?", None), TrialPrompt("2 + 2?", "4"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "contains no prompt"),
        ('{"prompt": "a"}\n{"prompt": ', "line 2: not valid JSON"),
        ('{"prompt": ""}', "line 1: prompt"),
        ('{"prompt": 5}', "line 1: prompt"),
        ('{"prompt": "a", "answer": "b"}', "line 1: must be an object"),
        ('["a"]', "line 1: must be a JSON object, not list"),
        ('{"prompt": "a", "reference": ""}', "line 1: reference"),
        ('{"prompt": "a", "reference": 4}', "line 1: reference"),
        ('{"prompt": "a"}\n{"prompt": "a"}', "occurs twice"),
        ("[" * 100_000, "line 1: not valid JSON"),
    ],
)
def test_invalid_lines_are_reported_with_their_place(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=r"trials/general\.jsonl") as refused:
        read_trial_prompts(written(tmp_path, text), "general")
    assert words in str(refused.value)


def test_a_missing_file_is_reported_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"trials/poetry\.jsonl does not exist. Write prompts"):
        read_trial_prompts(tmp_path, "poetry")
