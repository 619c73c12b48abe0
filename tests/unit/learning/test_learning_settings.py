"""`config/learning.yaml`: defaults, overrides per category, and errors."""

from __future__ import annotations

from pathlib import Path

import pytest

from router.errors import ConfigError
from router.settings.learning import LearningSettings, load_learning
from router.settings.router import load_config

CATEGORIES = ("technical", "creative", "general")


def written(folder: Path, text: str) -> Path:
    (folder / "learning.yaml").write_text(text, encoding="utf-8")
    return folder


def test_shipped_file_contains_the_defaults_and_known_categories() -> None:
    shipped = load_learning(None, load_config().categories)
    assert shipped.model_copy(update={"categories": {}}) == LearningSettings()


def test_folder_without_the_file_uses_the_shipped_one(tmp_path: Path) -> None:
    assert load_learning(tmp_path, CATEGORIES) == load_learning(None, CATEGORIES)


def test_category_overrides_the_usual_settings(tmp_path: Path) -> None:
    learning = load_learning(written(tmp_path, "categories: {creative: {cost: 0, floor: 0.2}}"), CATEGORIES)
    assert (learning.utility_of("creative").cost, learning.utility_of("creative").floor) == (0, 0.2)
    assert learning.utility_of("creative").score == learning.utility_of("general").score


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("margn: 1", "margn"),
        ("margin: -1", "margin"),
        ("categories: {poetry: {cost: 1}}", "categories.poetry: no such category"),
        ("categories: {creative: {colour: 1}}", "categories.creative.colour"),
        ("utility: {score: 0, success: 0, latency: 0, cost: 0}", "all 0"),
        ("exploration: {share: 0.9}", "exploration.share"),
        (
            "grading: {sources: {rumour: 1}}",
            "grading.sources.rumour: unknown key; the keys here are check, reference, judge, feedback",
        ),
        (
            "grading: {sources: {judge: -1}}",
            "grading.sources.judge: must be greater",
        ),
    ],
)
def test_invalid_setting_is_reported_with_its_key(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=r"learning\.yaml") as refused:
        load_learning(written(tmp_path, text), CATEGORIES)
    assert words in str(refused.value)
