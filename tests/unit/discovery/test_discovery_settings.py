"""`config/search.yaml`: defaults, overrides per category, and errors."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from router.errors import ConfigError
from router.settings.discovery import (
    CriteriaSettings,
    DiscoverySettings,
    FileCatalogSettings,
    ProbationSettings,
    ProviderCatalogSettings,
    TrialSettings,
    load_discovery,
)
from router.settings.environment import DEFAULT_CONFIG_FOLDER
from router.settings.router import load_config

CATEGORIES = ("technical", "creative", "general")


def written(folder: Path, text: str) -> Path:
    (folder / "search.yaml").write_text(text, encoding="utf-8")
    return folder


def test_shipped_file_contains_the_defaults_and_known_categories() -> None:
    shipped = load_discovery(None, CATEGORIES)
    assert set(shipped.categories) <= set(load_config().categories)
    assert shipped.trials == TrialSettings()
    assert shipped.probation == ProbationSettings()
    provider = ProviderCatalogSettings(kind="provider", name="provider")
    assert shipped.catalogs[1] == provider


def test_shipped_file_contains_every_key() -> None:
    data = yaml.safe_load((DEFAULT_CONFIG_FOLDER / "search.yaml").read_text(encoding="utf-8"))
    assert set(data) == set(DiscoverySettings.model_fields)
    assert set(data["criteria"]) == set(CriteriaSettings.model_fields)
    assert set(data["trials"]) == set(TrialSettings.model_fields)
    assert set(data["probation"]) == set(ProbationSettings.model_fields)
    file, provider = data["catalogs"]
    assert set(file) == set(FileCatalogSettings.model_fields)
    assert set(provider) == set(ProviderCatalogSettings.model_fields)


def test_folder_without_the_file_uses_the_shipped_one(tmp_path: Path) -> None:
    assert load_discovery(tmp_path, ("general",)) == load_discovery(None, CATEGORIES)


def test_category_overrides_the_usual_criteria(tmp_path: Path) -> None:
    text = "criteria: {context_min: 9, candidates: 1}\ncategories: {creative: {candidates: 5}}"
    search = load_discovery(written(tmp_path, text), CATEGORIES)
    assert (search.criteria_of("creative").candidates, search.criteria_of("creative").context_min) == (5, 9)
    assert search.criteria_of("general").candidates == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("criterias: {}", "criterias"),
        ("criteria: {license: [mit]}", "criteria.license"),
        ("criteria: {input_price_max: -1}", "criteria.input_price_max"),
        ("criteria: {parameters_min: 9, parameters_max: 3}", "parameters_max is less"),
        ("criteria: {benchmarks: {gpqa: 0}}", "criteria.benchmarks.gpqa: must be greater than 0, got 0"),
        ("criteria: {score_min: 0.5}", "score_min needs benchmarks"),
        ("criteria: {may_be_unknown: [colour]}", "may_be_unknown"),
        ("categories: {poetry: {candidates: 1}}", "categories.poetry: no such category"),
        ("categories: {creative: {candidats: 1}}", "categories.creative.candidats"),
        (
            "categories: {creative: {parameters_min: 5, parameters_max: 2}}",
            "categories.creative: parameters_max",
        ),
        ("catalogs: [{kind: file, name: a}]", "path"),
        ("catalogs: [{kind: rumour, name: a}]", "catalogs.0"),
        ("catalogs: [{kind: provider, name: a, key: sk-1}]", "key"),
        ("catalogs: [{kind: provider, name: a, key_variable: 'sk 1'}]", "key_variable"),
        ("catalogs: [{kind: provider, name: a}, {kind: file, name: a, path: b}]", "duplicate name 'a'"),
        ("trials: {prompts: 5, min_answers: 9}", "min_answers is more than prompts"),
        ("trials: {margin: -1}", "trials.margin"),
        ("probation: {target: often}", "probation.target"),
        ("probation: {min_calls: 0}", "probation.min_calls"),
        ("trials: {margin: 0.1, margin: 0.2}", "duplicate key"),
    ],
)
def test_invalid_setting_is_reported_with_its_key(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=r"search\.yaml") as refused:
        load_discovery(written(tmp_path, text), CATEGORIES)
    assert words in str(refused.value)
