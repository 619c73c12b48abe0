"""The models of the shipped catalog that the stand-in serves for a search to try."""

from __future__ import annotations

import pytest

from models_backend.__main__ import _parser, _settings
from models_backend.models import profile_of
from models_backend.settings import NEW_MODELS
from router.discovery.catalogs import open_catalogs
from router.discovery.trial_prompts import read_trial_prompts
from router.settings import DEFAULT_CONFIG_FOLDER, load_config, load_discovery

CATEGORIES = load_config().categories


def served(*arguments: str, **environment: str) -> dict[str, float]:
    """Model -> input price, as the stand-in starts with these arguments."""
    settings = _settings(_parser().parse_args(arguments), environment)
    return {model.name: model.input_price for model in settings.models.values()}


def test_prices_are_those_of_the_catalog() -> None:
    catalog = open_catalogs(load_discovery(None, CATEGORIES), DEFAULT_CONFIG_FOLDER)[0].read()
    listed = {model.name: (model.input_price, model.output_price) for model in catalog.models}
    for name, model in NEW_MODELS.items():
        assert listed[name] == (model.input_price, model.output_price)


@pytest.mark.parametrize(
    ("arguments", "environment", "expected"),
    [
        ((), {}, set(NEW_MODELS)),
        (("--no-new-models",), {}, set()),
        ((), {"LLAMA_API_BASE": "https://provider.example/v1"}, set()),  # a real provider has its own
        (("--no-new-models", "--also", "qwen3-32b"), {}, {"qwen3-32b"}),
    ],
)
def test_they_are_served_unless_told_otherwise(
    arguments: tuple[str, ...], environment: dict[str, str], expected: set[str]
) -> None:
    found = set(served(*arguments, **environment))
    assert found & set(NEW_MODELS) == expected
    assert found >= set(load_config().models)


def test_a_price_on_the_command_line_counts() -> None:
    assert served("--also", "llama-4-maverick=7/8")["llama-4-maverick"] == 7


def test_the_stand_in_knows_category_and_answer_of_each_trial_prompt() -> None:
    settings = _settings(_parser().parse_args([]), {})
    for category in CATEGORIES:
        for prompt in read_trial_prompts(DEFAULT_CONFIG_FOLDER, category):
            assert settings.categories[prompt.prompt] == category
            assert settings.references.get(prompt.prompt) == prompt.reference


def test_one_of_them_fails() -> None:
    assert [name for name in NEW_MODELS if profile_of(name).failing] == ["qwen3-32b"]
