"""A catalogue in a file: what is read, what is refused with which words, and what is no catalogue at all."""

from __future__ import annotations

import json
import os
import tracemalloc
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from router.discovery.catalogs import (
    CatalogModel,
    FileCatalog,
    ProviderCatalog,
    Reading,
    merged,
    open_catalogs,
    same_model,
)
from router.errors import CatalogError
from router.settings.discovery import DiscoverySettings, FileCatalogSettings, load_discovery
from router.settings.environment import DEFAULT_CONFIG_FOLDER
from router.settings.router import load_config

CATEGORIES = ("technical", "creative", "general")
GOOD = "{name: llama-9-good, license: mit, parameters: 7, context: 8192, input_price: 0.1, output_price: 0.2}"


def catalogue(path: Path, **settings: Any) -> FileCatalog:
    return FileCatalog(FileCatalogSettings(kind="file", name="mine", path=path.name, **settings), path)


def reading(folder: Path, text: str, name: str = "mine.yaml", **settings: Any) -> Reading:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return catalogue(path, **settings).read()


def the_model(folder: Path, entry: str) -> CatalogModel:
    found = reading(folder, f"models:\n  - {entry}\n")
    assert not found.refusals
    return found.models[0]


def test_an_entry_in_the_words_of_catalogues(tmp_path: Path) -> None:
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
        catalogue="mine",
    )


def test_what_is_not_said_is_none(tmp_path: Path) -> None:
    model = the_model(
        tmp_path,
        "{name: bare, license: other, parameters: n/a, context: '', input_price: ~, released: 1970-01-01}",
    )
    assert (model.license, model.parameters, model.context_tokens) == (None, None, None)
    assert (model.input_price, model.output_price, model.released, model.scores) == (None, None, None, {})


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("{name: x, input_price: -0.4}", "input_price: a price of -0.4 USD is below 0"),
        ("{name: x, output_price: 59000}", "absurd"),
        ("{name: x, input_price: .nan}", "input_price: .nan is no number"),
        ("{name: x, input_price: 1e400}", "no number"),
        ("{name: x, input_price: [1, 2]}", "input_price: a list is no number"),
        ("{name: x, parameters: 0}", "0 thousand million parameters cannot be"),
        ("{name: x, parameters: -8B}", "-8 thousand million parameters cannot be"),
        ("{name: x, parameters: 900000}", "parameters cannot be"),
        ("{name: x, context: 0}", "a context of 0 tokens cannot be"),
        ("{name: x, context: endless}", "context_tokens: endless is no number"),
        ("{name: x, scores: {MMLU: 104%}}", "scores.MMLU: 1.04 is not between 0 and 1"),
        ("{name: x, scores: {MMLU: 73.3}}", "a percentage is written with its %"),
        ("{name: x, scores: [1]}", "scores: must hold benchmarks"),
        ("{name: x, released: next spring}", "released: next spring is no day like 2024-07-23"),
        ("{name: x, released: 2024-13-45}", "is no day"),
        ("{name: x, released: 20240723}", "is no day"),
        ("{name: x, merge: perhaps}", "merge: perhaps is neither true nor false"),
        ("{name: x, available: false}", "not available"),
        ("{name: x, type: embedding}", "of the kind embedding"),
        ("{name: x, name: y}", "the key name stands twice"),
        ("{license: mit}", "it has no name"),
        ("{name: [x]}", "name: a list is no text"),
        ("{name: ../../etc/passwd}", "holds a path"),
        ("{name: /srv/weights/llama}", "holds a path"),
        ("{name: 'C:\\models\\llama'}", "holds a path"),
        ("{name: org/../llama}", "holds a path"),
        ("{name: llama..3}", "holds a path"),
        ("{name: a/b/c/d/e/f/g}", "holds a path"),
        ("{name: org/llama.Q4_K_M.gguf}", "that of a file"),
        ('{name: "llama\\n3"}', "not printable"),
        ('{name: "llama; rm -rf"}', "holds a path, or characters"),
        (f"{{name: {'x' * 101}}}", "more than 100"),
        (f"{{name: {'x' * 5000}}}", "longer than 200"),
        ("just-a-text", "no entry with keys and values"),
    ],
)
def test_a_bad_entry_is_refused_with_its_reason_and_the_rest_is_read(
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
        ("mine.yaml", "models: [{name: x", "no valid YAML"),
        ("mine.yaml", "models: {}", "no list of models"),
        ("mine.yaml", "", "no list of models"),
        ("mine.yaml", "just words", "no list of models"),
        ("mine.yaml", "- {name: x}\n---\n- {name: y}\n", "more than one YAML document"),
        ("mine.yaml", "models: []\nmodels: []\n", "no list of models"),
        ("mine.yaml", f"models: {'[' * 100_000}", "nested more than 20 deep"),
        ("mine.json", '{"models": [', "no JSON"),
        ("mine.json", '{"error": {"message": "no"}}', "no list of models"),
        ("mine.json", "[" * 100_000, "nested too deeply"),
        ("mine.yaml", "- {name: a}\n" * 6, "6 entries, and at most 5"),
    ],
)
def test_a_catalogue_that_cannot_be_read_names_itself_and_what_to_do(
    tmp_path: Path, name: str, text: str, words: str
) -> None:
    with pytest.raises(CatalogError, match=r"Catalog mine: .*mine") as refused:
        reading(tmp_path, text, name, max_models=5)
    assert words in str(refused.value)
    assert "Put the file right" in str(refused.value)
    assert len(str(refused.value)) < 600 + len(str(tmp_path))


def test_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"models: [\xff]")
    os.mkfifo(tmp_path / "pipe.yaml")
    for name, words in (
        ("gone.yaml", "no such file"),
        ("latin.yaml", "no UTF-8"),
        ("pipe.yaml", "no such file"),
    ):
        with pytest.raises(CatalogError, match=words):
            catalogue(tmp_path / name).read()


def test_a_file_of_50_mb_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "huge.yaml"
    with path.open("wb") as file:
        file.truncate(50 * 1024 * 1024)
    tracemalloc.start()
    with pytest.raises(CatalogError, match="larger than 4 MB"):
        catalogue(path).read()
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
def test_aliases_are_refused_before_they_multiply(tmp_path: Path, bomb: str) -> None:
    with pytest.raises(CatalogError, match=r"line \d: an alias"):
        reading(tmp_path, bomb)


def test_wild_json_is_one_bad_entry(tmp_path: Path) -> None:
    wild = (
        '{"name": "a", "parameters": %s}' % ("9" * 9000),
        '{"name": "b\\ud800\\u0000"}',
        '{"name": "c", "name": "d"}',
    )
    found = reading(tmp_path, f'{{"data": [{", ".join(wild)}, {{"id": "llama-e"}}]}}', "mine.json")
    assert [model.name for model in found.models] == ["llama-e"]
    assert [refusal.name for refusal in found.refusals] == ["a", "b??", "entry 3"]


def test_tags_mean_nothing(tmp_path: Path) -> None:
    found = reading(tmp_path, "- !!python/object/apply:os.system {name: llama-x}\n- !!int {name: llama-y}\n")
    assert [model.name for model in found.models] == ["llama-x", "llama-y"]


def test_one_model_under_several_names_becomes_one_with_all_that_is_known(tmp_path: Path) -> None:
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
    assert refusals[0].reason == "the same model as llama-3.3-70b-versatile of the same catalogue"


@pytest.mark.parametrize(
    "entry",
    [
        "{name: x, merge: yes}",
        "{name: x, base_model: org/x (Merge)}",
        "{name: x, flags: [official, merged]}",
        "{name: starlit-llama-slerp}",
    ],
)
def test_a_merge_is_known_by_its_flag_its_base_or_its_name(tmp_path: Path, entry: str) -> None:
    assert the_model(tmp_path, entry).is_merge


def test_the_price_among_hosts_is_the_middle_one(tmp_path: Path) -> None:
    hosts = [["a", 0.2, 0.3, 50, 0.5], ["b", 0.25, 0.4], ["typo", 250, 400]]
    entry = {"name": "llama-x", "price_usd_per_mtok": hosts}
    model = reading(tmp_path, json.dumps([entry]), "mine.json").models[0]
    assert (model.input_price, model.output_price) == (0.25, 0.4)


def test_the_shipped_catalogue_has_each_kind_of_dirt_and_is_read_whole() -> None:
    found = catalogue(DEFAULT_CONFIG_FOLDER / "llama_catalog.yaml").read()
    assert 60 <= len(found.models) + len(found.refusals) <= 80
    said = " ".join(refusal.reason for refusal in found.refusals)
    for words in (
        "below 0", "absurd", "0 thousand million", "holds a path", "that of a file", "not between 0 and 1",
        "is no number", "is no day", "no name", "stands twice", "no entry", "not available",
    ):  # fmt: skip
        assert words in said
    assert merged(found.models)[1]


def test_the_roster_s_own_models_are_found_in_the_shipped_catalogue_with_their_prices() -> None:
    once, _ = merged(catalogue(DEFAULT_CONFIG_FOLDER / "llama_catalog.yaml").read().models)
    for name, model in load_config().models.items():
        listed = [one for one in once if same_model(one.name, name)]
        assert (listed[0].input_price, listed[0].output_price) == (model.input_price, model.output_price), (
            name
        )


def test_a_real_catalogue_is_read(shared_data: Path) -> None:
    found = catalogue(shared_data / "llama" / "catalogue.json").read()
    assert len(found.models) >= 95
    by_endpoint = {model.endpoint: model for model in found.models}
    model = by_endpoint["meta-llama/Llama-3.1-8B-Instruct"]
    assert (model.license, model.parameters, model.context_tokens) == ("llama-3.1", 8.03, 131_072)
    assert all(0 <= score <= 1 for one in found.models for score in one.scores.values())
    assert by_endpoint["mlabonne/ChimeraLlama-3-8B-v3"].is_merge
    assert any("is not available" in refusal.reason for refusal in found.refusals)
    once, doubles = merged(found.models)
    assert len(once) + len(doubles) == len(found.models)
    assert any("Meta-Llama-3.1-8B-Instruct" in refusal.name for refusal in doubles)


def test_catalogues_come_in_their_order_and_a_provider_without_an_address_is_left_out(tmp_path: Path) -> None:
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


def test_a_broken_catalogue_does_not_stop_another(tmp_path: Path) -> None:
    (tmp_path / "good.yaml").write_text(f"- {GOOD}\n", encoding="utf-8")
    names = ("broken.yaml", "good.yaml")
    listed = [{"kind": "file", "name": name.split(".")[0], "path": name} for name in names]
    broken, good = open_catalogs(DiscoverySettings.model_validate({"catalogs": listed}), tmp_path, {})
    with pytest.raises(CatalogError, match="Catalog broken"):
        broken.read()
    assert len(good.read().models) == 1
