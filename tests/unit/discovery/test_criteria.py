"""Criteria: models that pass, their order, and the reasons of refusals."""

from __future__ import annotations

from dataclasses import replace
from datetime import date
from typing import Any

import pytest

from router.discovery.catalog_entry import CatalogModel
from router.discovery.catalogs import open_catalogs
from router.discovery.criteria import passing
from router.discovery.model_names import same_model
from router.settings.discovery import DiscoverySettings, load_discovery
from router.settings.environment import DEFAULT_CONFIG_FOLDER
from router.settings.router import load_config

TODAY = date(2026, 11, 15)
FITTING = CatalogModel(
    name="llama-x-70b",
    endpoint="llama-x-70b",
    license="llama-3.3",
    parameters=70.0,
    context_tokens=131_072,
    input_price=0.5,
    output_price=0.8,
    scores={"gpqa": 0.6, "math": 0.8},
    released=date(2025, 6, 1),
    is_merge=False,
    catalog="mine",
)
CRITERIA = {
    "licenses": ["llama-3.3", "mit"],
    "parameters_min": 3,
    "parameters_max": 100,
    "context_min": 8000,
    "input_price_max": 1,
    "output_price_max": 2,
    "benchmarks": {"gpqa": 3, "math": 1},
    "score_min": 0.5,
    "age_days_max": 700,
}


def settings(**different: Any) -> DiscoverySettings:
    return DiscoverySettings.model_validate(
        {"criteria": {**CRITERIA, **different}, "categories": {"creative": {"score_min": 0.9}}}
    )


def reasons(model: CatalogModel, **different: Any) -> str:
    found, refusals = passing([model], "technical", settings(**different), TODAY)
    assert len(found) + len(refusals) == 1
    return refusals[0].reason if refusals else ""


def test_a_fitting_model_passes() -> None:
    assert reasons(FITTING) == ""


@pytest.mark.parametrize(
    ("different", "words"),
    [
        ({"license": "cc-by-nc-4.0"}, "license cc-by-nc-4.0 not allowed"),
        ({"license": None}, "license unknown"),
        ({"parameters": 1.0}, "1B parameters, less than 3B"),
        ({"parameters": 405.0}, "405B parameters, more than 100B"),
        ({"parameters": None}, "number of parameters unknown"),
        ({"context_tokens": 4096}, "context of 4096 tokens, less than 8000"),
        ({"context_tokens": None}, "context length unknown"),
        ({"input_price": 1.5}, "input price of 1.5 USD per million tokens, more than 1"),
        ({"output_price": 2.5}, "output price of 2.5"),
        ({"output_price": None}, "output price unknown"),
        ({"scores": {"gpqa": 0.4, "math": 0.5}}, "score 0.425, less than 0.5"),
        ({"scores": {"math": 0.9}}, "too few benchmarks known of gpqa, math"),
        ({"scores": {}}, "too few benchmarks known"),
        ({"released": date(2024, 6, 1)}, "more than 700 days ago"),
        ({"released": date(2087, 1, 1)}, "is in the future"),
        ({"released": None}, "release date unknown"),
        ({"is_merge": True}, "a merge of other models"),
    ],
)
def test_each_criterion_refuses_with_its_own_reason(different: dict[str, Any], words: str) -> None:
    assert words in reasons(replace(FITTING, **different))


def test_all_reasons_are_reported_at_once() -> None:
    assert reasons(replace(FITTING, license=None, is_merge=True)).count(";") == 1


@pytest.mark.parametrize(
    ("fact", "unknown"),
    [
        ("license", {"license": None}),
        ("parameters", {"parameters": None}),
        ("context", {"context_tokens": None}),
        ("price", {"input_price": None, "output_price": None}),
        ("score", {"scores": {}}),
        ("age", {"released": None}),
    ],
)
def test_facts_that_may_be_unknown(fact: str, unknown: dict[str, Any]) -> None:
    assert reasons(replace(FITTING, **unknown)) != ""
    assert reasons(replace(FITTING, **unknown), may_be_unknown=[fact]) == ""


def test_criteria_that_are_not_set_refuse_nothing() -> None:
    bare = replace(
        FITTING, license=None, parameters=None, context_tokens=None, input_price=None, output_price=None,
        scores={}, released=None,
    )  # fmt: skip
    found, _ = passing([bare], "technical", DiscoverySettings(), TODAY)
    assert found == [bare]


def test_merges_pass_if_allowed() -> None:
    assert reasons(replace(FITTING, is_merge=True), merges=True) == ""


def test_models_are_ordered_by_benchmarks_then_price_then_age() -> None:
    models = [
        replace(FITTING, name="old", released=date(2025, 1, 1)),
        replace(FITTING, name="good", scores={"gpqa": 0.7, "math": 0.6}),
        replace(FITTING, name="half-known", scores={"gpqa": 0.66}),
        replace(FITTING, name="cheap", input_price=0.4, released=date(2025, 3, 1)),
        FITTING,
    ]
    found, _ = passing(models, "technical", settings(), TODAY)
    assert [model.name for model in found] == ["good", "half-known", "cheap", "llama-x-70b", "old"]


def test_a_category_may_be_stricter() -> None:
    assert passing([FITTING], "creative", settings(), TODAY)[0] == []


def test_each_model_is_tried_once() -> None:
    twice = [
        replace(FITTING, name="llama-x-70b-instruct", scores={"gpqa": 0.7, "math": 0.7}),
        FITTING,
        replace(FITTING, name="meta-llama-x-70b-instruct-fp8", endpoint="other", catalog="second"),
    ]
    found, refusals = passing(twice, "technical", settings(), TODAY)
    assert [model.name for model in found] == ["llama-x-70b-instruct"]
    assert {refusal.name: refusal.reason for refusal in refusals} == {
        "other": "the same model as llama-x-70b-instruct of catalog mine",
        "llama-x-70b": "the same model as llama-x-70b-instruct, which has a better score",
    }


@pytest.mark.parametrize(
    ("category", "better"), [("technical", "llama-3.3-nemotron-super-49b"), ("creative", "llama-4-maverick")]
)
def test_the_shipped_catalog_has_better_models_and_every_kind_of_refusal(category: str, better: str) -> None:
    config = load_config()
    search = load_discovery(None, config.categories)
    (file,) = open_catalogs(search, DEFAULT_CONFIG_FOLDER, {})
    found, refusals = passing(file.read().models, category, search, TODAY)
    new = [model.name for model in found if not any(same_model(model.name, name) for name in config.models)]
    assert better in new[: search.criteria_of(category).candidates]
    reasons_given = " ".join(refusal.reason for refusal in refusals)
    for words in (
        "the same model as", "license unknown", "not allowed", "B parameters, less than",
        "B parameters, more than", "context of", "price of", "in the future", "days ago", "a merge",
        "too few",
    ):  # fmt: skip
        assert words in reasons_given, words
