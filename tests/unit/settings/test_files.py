"""Settings classes: immutable, strict, and tolerant of the keys of the previous release."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field, ValidationError

from router.errors import ConfigError
from router.settings import DEFAULT_CONFIG_FOLDER, load_config, load_discovery, own_or_shipped
from router.settings.discovery import TrialSettings
from router.settings.files import Frozen, validated


def subclasses(kind: type[Frozen]) -> list[type[Frozen]]:
    return [found for own in kind.__subclasses__() for found in (own, *subclasses(own))]


CLASSES = [kind for kind in subclasses(Frozen) if kind.__module__.startswith("router.")]
RENAMED = [(kind, old, new) for kind in CLASSES for old, new in kind.renamed_keys.items() if new is not None]
REMOVED = [(kind, old) for kind in CLASSES for old, new in kind.renamed_keys.items() if new is None]
FILE = Path("/etc/router/some.yaml")


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_every_settings_class_is_immutable_and_strict(kind: type[Frozen]) -> None:
    instance = kind.model_construct()
    with pytest.raises(ValidationError, match="frozen"):
        instance.some_key = 1  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"some_key|this key is required") as caught:
        validated(kind, {"some_key": 1}, FILE)
    assert str(FILE) in str(caught.value)
    assert kind.renamed_keys.keys().isdisjoint(kind.model_fields)
    assert set(kind.renamed_keys.values()) <= {None, *kind.model_fields}


@pytest.mark.parametrize(("kind", "old", "new"), RENAMED)
def test_former_key_is_accepted_with_a_warning(
    kind: type[Frozen], old: str, new: str, caplog: pytest.LogCaptureFixture
) -> None:
    invalid = object()  # no field accepts it, so the error names the key that was read
    with caplog.at_level(logging.WARNING, "router.settings"), pytest.raises(ValidationError) as caught:
        kind.model_validate({old: invalid}, context=FILE)
    assert (new,) in {error["loc"][:1] for error in caught.value.errors()}
    assert (old,) not in {error["loc"][:1] for error in caught.value.errors()}
    assert caplog.messages == [f"{FILE}: {old} is now called {new}; rename it before the next release"]


@pytest.mark.parametrize(("kind", "old", "new"), RENAMED)
def test_former_and_new_key_together_are_an_error(kind: type[Frozen], old: str, new: str) -> None:
    with pytest.raises(ConfigError, match=f"{old} is the former name of {new}: keep only {new}"):
        validated(kind, {old: 1, new: 1}, FILE)


@pytest.mark.parametrize(("kind", "old"), REMOVED)
def test_removed_key_is_ignored_with_a_warning(
    kind: type[Frozen], old: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert validated(kind, {old: 1}, FILE) == kind()
    assert caplog.messages == [f"{FILE}: {old} is no longer used; remove it before the next release"]


def test_value_of_a_former_key_is_used() -> None:
    assert validated(TrialSettings, {"at_once": 7}, FILE).max_concurrency == 7


def test_former_key_in_overrides_of_a_category_is_accepted_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "search.yaml"
    file.write_text("categories: {creative: {licences: [mit]}}")
    settings = load_discovery(tmp_path, ["creative"])
    assert settings.criteria_of("creative").licenses == ("mit",)
    assert caplog.messages == [f"{file}: licences is now called licenses; rename it before the next release"]


def test_shipped_configuration_uses_no_former_key(caplog: pytest.LogCaptureFixture) -> None:
    load_discovery(None, load_config().categories)
    assert not caplog.messages


def test_own_file_precedes_the_shipped_one(tmp_path: Path) -> None:
    assert own_or_shipped(tmp_path, "learning.yaml") == DEFAULT_CONFIG_FOLDER / "learning.yaml"
    (tmp_path / "learning.yaml").touch()
    assert own_or_shipped(tmp_path, "learning.yaml") == tmp_path / "learning.yaml"
    assert own_or_shipped(tmp_path, "missing.yaml") == tmp_path / "missing.yaml"


class Inner(Frozen):
    weight: float = Field(default=1.0, gt=0)
    name: str = Field(default="x", min_length=1)
    mode: Literal["fast", "slow"] = "fast"
    count: int = 1
    parts: tuple[str, ...] = ()


class Outer(Frozen):
    needed: int
    one: Inner | None = None
    many: tuple[Inner, ...] = ()
    named: dict[str, Inner] = Field(default={})
    sized: dict[Annotated[str, Field(pattern="^(big|small)$")], int] = Field(default={})
    short: dict[Annotated[str, Field(max_length=2)], int] = Field(default={})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "needed: this key is required; add it"),
        ({"neded": 1, "needed": 1}, "neded: unknown key; did you mean `needed`?"),
        (
            {"colour": 1, "needed": 1},
            "colour: unknown key; the keys here are needed, one, many, named, sized, short",
        ),
        ({"needed": 1, "one": {"wieght": 1}}, "one.wieght: unknown key; did you mean `weight`?"),
        ({"needed": 1, "many": [{"nmae": 1}]}, "many.0.nmae: unknown key; did you mean `name`?"),
        (
            {"needed": 1, "named": {"phi-4": {"wieght": 1}}},
            "named.phi-4.wieght: unknown key; did you mean `weight`?",
        ),
        ({"needed": "soon"}, "needed: must be an integer, got 'soon'"),
        ({"needed": 1.5}, "needed: must be an integer, got 1.5"),
        ({"needed": None}, "needed: must be an integer, got nothing"),
        ({"needed": 1, "one": {"weight": 0}}, "one.weight: must be greater than 0, got 0"),
        ({"needed": 1, "one": {"weight": "x" * 99}}, f"one.weight: must be a number, got '{'x' * 58}…"),
        ({"needed": 1, "one": {"name": ""}}, "one.name: must have at least 1 character, got ''"),
        ({"needed": 1, "one": {"name": [1]}}, "one.name: must be a string, got a list"),
        ({"needed": 1, "one": {"mode": "off"}}, "one.mode: must be 'fast' or 'slow', got 'off'"),
        ({"needed": 1, "one": {"parts": "a"}}, "one.parts: must be a list, got 'a'"),
        ({"needed": 1, "one": 3}, "one: must be a mapping of keys to values, got 3"),
        ({"needed": 1, "named": []}, "named: must be a mapping of keys to values, got a list"),
        ({"needed": 1, "sized": {"bigg": 1}}, "sized.bigg: unknown key; did you mean `big`?"),
        (
            {"needed": 1, "sized": {"huge": 1}},
            "sized.huge: unknown key; the keys here are big, small",
        ),
        ({"needed": 1, "short": {"long": 1}}, "short.long: this key must have at most 2 characters"),
    ],
)
def test_error_names_key_value_and_remedy(data: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validated(Outer, data, FILE)
    assert str(caught.value) == f"{FILE}: {message}"
