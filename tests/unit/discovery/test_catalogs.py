"""Catalog files: values that are read, entries that are refused, and files that cannot be read."""

from __future__ import annotations

import json
import os
import tracemalloc
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from router.discovery.catalog_entry import CatalogModel, Reading, merged
from router.discovery.catalogs import FileCatalog, ProviderCatalog, open_catalogs
from router.discovery.model_names import same_model
from router.errors import CatalogError
from router.settings.discovery import DiscoverySettings, FileCatalogSettings, load_discovery
from router.settings.environment import DEFAULT_CONFIG_FOLDER
from router.settings.router import load_config

CATEGORIES = ("technical", "creative", "general")
GOOD = "{name: llama-9-good, license: mit, parameters: 7, context: 8192, input_price: 0.1, output_price: 0.2}"


def catalog(path: Path, **settings: Any) -> FileCatalog:
    return FileCatalog(FileCatalogSettings(kind="file", name="mine", path=path.name, **settings), path)


def reading(folder: Path, text: str, name: str = "mine.yaml", **settings: Any) -> Reading:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return catalog(path, **settings).read()


def the_model(folder: Path, entry: str) -> CatalogModel:
    found = reading(folder, f"models:\n  - {entry}\n")
    assert not found.refusals
    return found.models[0]


def test_values_with_units_are_read(tmp_path: Path) -> None:
    entry = """{name: meta-llama/Llama-3.3-70B-Instruct, license: Llama 3.3 Community License Agreement,
      parameters: 70.6B, context: 128k tokens, input_price: $0.59, output_price: 0.79,
      scores: {MMLU-Pro: 68.9%, IFEval: 0.921, MATH (CoT): .77}, released: 2024-12-06}"""
    assert the_model(tmp_path, entry) == CatalogModel(
        name="llama-3.3-70b-instruct",
        endpoint="meta-llama/Llama-3.3-70B-Instruct",
        license="llama-3.3",
        parameters=70.6,
        context_tokens=128_000,
        input_price=0.59,
        output_price=0.79,
        scores={"mmlu-pro": pytest.approx(0.689), "ifeval": 0.921, "math": 0.77},
        released=date(2024, 12, 6),
        is_merge=False,
        catalog="mine",
    )


def test_missing_values_are_none(tmp_path: Path) -> None:
    model = the_model(
        tmp_path,
        "{name: bare, license: other, parameters: n/a, context: '', input_price: ~, released: 1970-01-01}",
    )
    assert (model.license, model.parameters, model.context_tokens) == (None, None, None)
    assert (model.input_price, model.output_price, model.released, model.scores) == (None, None, None, {})


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("{name: x, input_price: -0.4}", "input_price: input should be greater than or equal to 0, got -0.4"),
        ("{name: x, output_price: 59000}", "less than or equal to 1000, got 59000"),
        (
            "{name: x, input_price: .nan}",
            "input_price: input should be a number",
        ),
        ("{name: x, input_price: 1e400}", "should be a number"),
        ("{name: x, input_price: [1, 2]}", "a number, with a known unit or none, got a list"),
        ("{name: x, parameters: 0}", "parameters: input should be greater than 0, got 0"),
        ("{name: x, parameters: -8B}", "parameters: input should be greater than 0, got -8B"),
        ("{name: x, parameters: 900000}", "parameters: input should be less than or equal to 20000"),
        ("{name: x, context: 0}", "context: input should be greater than or equal to 1, got 0"),
        (
            "{name: x, context: endless}",
            "a known unit or none, got endless",
        ),
        (
            "{name: x, scores: {MMLU: 104%}}",
            "scores.MMLU: input should be between 0 and 1",
        ),
        ("{name: x, scores: {MMLU: 73.3}}", "a percentage with its %"),
        ("{name: x, scores: [1]}", "scores: input should be a valid dictionary, got a list"),
        (
            "{name: x, released: next spring}",
            "a date like 2024-07-23, got next spring",
        ),
        ("{name: x, released: 2024-13-45}", "should be a date"),
        ("{name: x, released: 20240723}", "should be a date"),
        (
            "{name: x, merge: perhaps}",
            "merge: input should be a valid boolean",
        ),
        ("{name: x, available: false}", "lists the model as unavailable"),
        ("{name: x, type: embedding}", "type: a model of this kind does not answer prompts, got embedding"),
        ("{name: x, name: y}", "got a mapping with the key name twice"),
        ("{license: mit}", "the entry has no name"),
        ("{name: [x]}", "name: input should be a valid string, got a list"),
        ("{name: ../../etc/passwd}", "not a path"),
        ("{name: /srv/weights/llama}", "not a path"),
        ("{name: 'C:\\models\\llama'}", "not a path"),
        ("{name: org/../llama}", "not a path"),
        ("{name: llama..3}", "not a path"),
        ("{name: a/b/c/d/e/f/g}", "not a path"),
        ("{name: org/llama.Q4_K_M.gguf}", "not the name of a file"),
        ('{name: "llama\\n3"}', "only printable characters"),
        ('{name: "llama; rm -rf"}', "without special characters"),
        (f"{{name: {'x' * 101}}}", "at most 100"),
        (f"{{name: {'x' * 5000}}}", "at most 200"),
        ("just-a-text", "should be a mapping of keys to values"),
    ],
)
def test_a_bad_entry_is_refused_with_its_reason_and_the_others_are_read(
    tmp_path: Path, entry: str, words: str
) -> None:
    found = reading(tmp_path, f"models:\n  - {entry}\n  - {GOOD}\n")
    assert [model.name for model in found.models] == ["llama-9-good"]
    assert len(found.refusals) == 1
    assert words in found.refusals[0].reason
    assert len(found.refusals[0].reason) < 300
    assert found.refusals[0].name.isprintable()
    assert len(found.refusals[0].name) <= 103


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("mine.yaml", "models: [{name: x", "not valid YAML"),
        ("mine.yaml", "models: {}", "no list of models"),
        ("mine.yaml", "", "no list of models"),
        ("mine.yaml", "just words", "no list of models"),
        ("mine.yaml", "- {name: x}\n---\n- {name: y}\n", "expected a single document"),
        ("mine.yaml", "models: []\nmodels: []\n", "no list of models"),
        ("mine.yaml", f"models: {'[' * 100_000}", "nested more than 20 levels deep"),
        ("mine.json", '{"models": [', "not valid JSON"),
        ("mine.json", '{"error": {"message": "no"}}', "no list of models"),
        ("mine.json", "[" * 100_000, "nested too deeply"),
        ("mine.yaml", "- {name: a}\n" * 6, "more than 5 entries"),
        ("mine.yaml", "models:\n" + "- {}\n" * 100_000, "more than 5 entries"),
    ],
)
def test_an_unreadable_catalog_is_named_with_the_next_step(
    tmp_path: Path, name: str, text: str, words: str
) -> None:
    with pytest.raises(CatalogError, match=r"Catalog mine: .*mine") as refused:
        reading(tmp_path, text, name, max_models=5)
    assert words in str(refused.value)
    assert "Fix the file" in str(refused.value)
    assert len(str(refused.value)) < 600 + len(str(tmp_path))


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"models: [\xff]")
    os.mkfifo(tmp_path / "pipe.yaml")
    for name, words in (
        ("gone.yaml", "no such file"),
        ("latin.yaml", "not valid UTF-8"),
        ("pipe.yaml", "no such file"),
    ):
        with pytest.raises(CatalogError, match=words):
            catalog(tmp_path / name).read()


def test_a_file_over_the_size_limit_is_not_loaded(tmp_path: Path) -> None:
    path = tmp_path / "huge.yaml"
    with path.open("wb") as file:
        file.truncate(50 * 1024 * 1024)
    tracemalloc.start()
    with pytest.raises(CatalogError, match="larger than 4 MB"):
        catalog(path).read()
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 10 * 1024 * 1024


BOMB = "a0: &a0 {name: x}\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 30)
)
MERGING_BOMB = "a0: &a0 {name: x}\n" + "".join(
    f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}], k{n}: 1}}\n" for n in range(1, 30)
)


@pytest.mark.parametrize("bomb", [BOMB, MERGING_BOMB, "models: &a [*a]\n"])
def test_aliases_are_refused_before_they_expand(tmp_path: Path, bomb: str) -> None:
    with pytest.raises(CatalogError, match=r"line \d: an alias"):
        reading(tmp_path, bomb)


def test_malformed_json_values_refuse_only_their_entry(tmp_path: Path) -> None:
    wild = (
        '{"name": "a", "parameters": %s}' % ("9" * 9000),
        '{"name": "b\\ud800\\u0000"}',
        '{"name": "c", "name": "d"}',
    )
    found = reading(tmp_path, f'{{"data": [{", ".join(wild)}, {{"id": "llama-e"}}]}}', "mine.json")
    assert [model.name for model in found.models] == ["llama-e"]
    assert [refusal.name for refusal in found.refusals] == ["a", "b\ufffd\ufffd", "entry 3"]


def test_yaml_tags_are_ignored(tmp_path: Path) -> None:
    found = reading(tmp_path, "- !!python/object/apply:os.system {name: llama-x}\n- !!int {name: llama-y}\n")
    assert [model.name for model in found.models] == ["llama-x", "llama-y"]


def test_spellings_of_one_model_are_merged_with_all_facts(tmp_path: Path) -> None:
    entries = """
    - {name: llama-3.3-70b-versatile, context: 128k, input_price: 0.5, output_price: 0.6}
    - {name: meta-llama/Llama-3.3-70B-Instruct, license: llama3.3, parameters: 70.6, input_price: 9,
       output_price: 9, scores: {MMLU: 0.86}}
    - {name: llama-v3p3-70b-instruct, merge: true, released: 2024-12-06}
    - {name: llama-3.3-70b, license: mit}
    """
    once, refusals = merged(reading(tmp_path, entries).models)
    assert [model.name for model in once] == ["llama-3.3-70b-versatile", "llama-3.3-70b"]
    one = once[0]
    assert (one.license, one.parameters, one.context_tokens) == ("llama-3.3", 70.6, 128_000)
    assert (one.input_price, one.output_price, one.scores) == (0.5, 0.6, {"mmlu": 0.86})
    assert (one.released, one.is_merge) == (date(2024, 12, 6), True)
    assert [refusal.name for refusal in refusals] == [
        "meta-llama/Llama-3.3-70B-Instruct", "llama-v3p3-70b-instruct"
    ]  # fmt: skip
    assert refusals[0].reason == "the same model as llama-3.3-70b-versatile of the same catalog"


@pytest.mark.parametrize(
    "entry",
    [
        "{name: x, merge: yes}",
        "{name: x, base_model: org/x (Merge)}",
        "{name: x, flags: [official, merged]}",
        "{name: starlit-llama-slerp}",
    ],
)
def test_a_merge_is_recognized_by_flag_base_model_or_name(tmp_path: Path, entry: str) -> None:
    assert the_model(tmp_path, entry).is_merge


def test_the_median_host_price_is_used(tmp_path: Path) -> None:
    hosts = [["a", 0.2, 0.3, 50, 0.5], ["b", 0.25, 0.4], ["typo", 250, 400]]
    entry = {"name": "llama-x", "price_usd_per_mtok": hosts}
    model = reading(tmp_path, json.dumps([entry]), "mine.json").models[0]
    assert (model.input_price, model.output_price) == (0.25, 0.4)


def test_the_shipped_catalog_contains_every_kind_of_bad_entry() -> None:
    found = catalog(DEFAULT_CONFIG_FOLDER / "llama_catalog.yaml").read()
    assert 60 <= len(found.models) + len(found.refusals) <= 80
    reasons = " ".join(refusal.reason for refusal in found.refusals)
    for words in (
        "or equal to 0, got -0.40", "equal to 1000, got 59000", "greater than 0, got 0", "not a path",
        "not the name of a file", "between 0 and 1", "should be a number", "should be a date", "has no name",
        "the key license twice", "should be a mapping", "as unavailable",
    ):  # fmt: skip
        assert words in reasons
    assert merged(found.models)[1]


def test_the_shipped_catalog_lists_the_roster_with_its_prices() -> None:
    once, _ = merged(catalog(DEFAULT_CONFIG_FOLDER / "llama_catalog.yaml").read().models)
    for name, model in load_config().models.items():
        listed = [one for one in once if same_model(one.name, name)]
        assert (listed[0].input_price, listed[0].output_price) == (model.input_price, model.output_price), (
            name
        )


def test_a_real_catalog_is_read(shared_data: Path) -> None:
    found = catalog(shared_data / "llama" / "catalogue.json").read()
    assert len(found.models) >= 95
    by_endpoint = {model.endpoint: model for model in found.models}
    model = by_endpoint["meta-llama/Llama-3.1-8B-Instruct"]
    assert (model.license, model.parameters, model.context_tokens) == ("llama-3.1", 8.03, 131_072)
    assert all(0 <= score <= 1 for one in found.models for score in one.scores.values())
    assert by_endpoint["mlabonne/ChimeraLlama-3-8B-v3"].is_merge
    assert any("as unavailable" in refusal.reason for refusal in found.refusals)
    once, doubles = merged(found.models)
    assert len(once) + len(doubles) == len(found.models)
    assert any("Meta-Llama-3.1-8B-Instruct" in refusal.name for refusal in doubles)


def test_catalogs_keep_their_order_and_a_provider_without_address_is_skipped(tmp_path: Path) -> None:
    settings = load_discovery(None, CATEGORIES)
    (alone,) = open_catalogs(settings, tmp_path, {})
    assert isinstance(alone, FileCatalog)
    assert alone.path == DEFAULT_CONFIG_FOLDER / "llama_catalog.yaml"
    (tmp_path / "llama_catalog.yaml").write_text(f"- {GOOD}\n", encoding="utf-8")
    environment = {"LLAMA_API_BASE": "http://127.0.0.1:9/v1", "LLAMA_API_KEY": "sk-very-secret"}
    file, provider = open_catalogs(settings, tmp_path, environment)
    assert [model.name for model in file.read().models] == ["llama-9-good"]
    assert isinstance(provider, ProviderCatalog)
    assert "sk-very-secret" not in repr(provider)


def test_a_broken_catalog_does_not_affect_another(tmp_path: Path) -> None:
    (tmp_path / "good.yaml").write_text(f"- {GOOD}\n", encoding="utf-8")
    names = ("broken.yaml", "good.yaml")
    listed = [{"kind": "file", "name": name.split(".")[0], "path": name} for name in names]
    broken, good = open_catalogs(DiscoverySettings.model_validate({"catalogs": listed}), tmp_path, {})
    with pytest.raises(CatalogError, match="Catalog broken"):
        broken.read()
    assert len(good.read().models) == 1
