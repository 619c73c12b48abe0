"""The cache of trained models: reused only if training would give the same, and never if broken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from router.classification import linear_model
from router.classification.classifier import Classification, Classifier
from router.classification.linear_model import LinearModel
from router.settings.classification import RuleSettings, load_categories

PROMPTS = ["How do I cook a goose?", "What are the rules of polo?", "soup or chess", ""]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A config folder with two small categories."""
    folder = tmp_path / "config"
    folder.mkdir()
    (folder / "categories.yaml").write_text(
        "categories: {cooking: what one eats, sport: what one plays}\n"
        "default_category: sport\nexamples: [a.jsonl]\n"
    )
    labeled = [("cooking", f"How do I cook {dish}?") for dish in ("soup", "bread", "cake", "stew")]
    labeled += [("sport", f"What are the rules of {game}?") for game in ("chess", "tennis", "rowing", "judo")]
    lines = [{"prompt": prompt, "category": category, "kind": "x"} for category, prompt in labeled]
    (folder / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


class Builder:
    """Builds classifiers with one cache folder, and counts how often they train."""

    def __init__(self, config: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.config, self.folder, self.trained = config, folder, 0
        train = LinearModel.train

        def counted(*values: Any) -> LinearModel:
            self.trained += 1
            return train(*values)

        monkeypatch.setattr(LinearModel, "train", counted)

    def classify(self, **changes: Any) -> list[Classification]:
        settings = load_categories(self.config).model_copy(update=changes)
        return Classifier.build(settings, self.folder).classify_many(PROMPTS)

    @property
    def files(self) -> list[Path]:
        return sorted(self.folder.iterdir())


@pytest.fixture
def builder(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Builder:
    return Builder(config, tmp_path / "learned", monkeypatch)


def test_trained_model_is_reused_with_the_same_results(builder: Builder) -> None:
    found = builder.classify()
    assert builder.classify() == found
    assert builder.trained == 1
    assert len(builder.files) == 1
    assert found == Classifier.build(load_categories(builder.config)).classify_many(PROMPTS)


def test_other_examples_settings_code_or_libraries_are_trained_again(
    builder: Builder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    builder.classify()
    builder.classify(rules=(RuleSettings(category="sport", pattern="goose"),))
    assert builder.trained == 2
    examples = builder.config / "a.jsonl"
    examples.write_text(examples.read_text().replace("judo", "golf"))
    builder.classify()
    assert builder.trained == 3
    with monkeypatch.context() as patch:
        patch.setattr("router.classification.classifier.version", lambda library: f"another {library}")
        builder.classify()
    assert builder.trained == 4
    edited = tmp_path / "linear_model.py"
    edited.write_bytes(Path(linear_model.__file__).read_bytes() + b"# edited\n")
    monkeypatch.setattr(linear_model, "__file__", str(edited))
    builder.classify()
    assert builder.trained == 5


def test_moved_config_folder_reuses_the_model(builder: Builder, tmp_path: Path) -> None:
    builder.classify()
    builder.config = builder.config.rename(tmp_path / "moved")
    builder.classify()
    assert builder.trained == 1


@pytest.mark.parametrize(
    "how", ["empty", "truncated", "flipped bit", "no archive", "missing array", "objects"]
)
def test_broken_file_is_replaced(builder: Builder, how: str) -> None:
    found = builder.classify()
    (file,) = builder.files
    whole = file.read_bytes()
    with np.load(file) as arrays:
        stored = dict(arrays)
    if how == "objects":  # would need pickle, which can run foreign code
        stored["intercepts"] = np.array([object()], dtype=object)
    elif how == "missing array":
        del stored["intercepts"]
    if how in ("objects", "missing array"):
        np.savez(file, **stored)
    else:
        middle = len(whole) // 2
        flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
        broken = {"empty": b"", "truncated": whole[:-900], "flipped bit": flipped, "no archive": b"x" * 5000}
        file.write_bytes(broken[how])
    assert builder.classify() == found
    assert builder.trained == 2
    assert builder.classify() == found
    assert builder.trained == 2


def test_without_writable_folder_every_build_trains(builder: Builder) -> None:
    builder.folder.write_text("in the way")
    assert builder.classify() == builder.classify()
    assert builder.trained == 2
    assert builder.folder.read_text() == "in the way"


def test_cache_keeps_the_most_recently_used_models(builder: Builder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_model, "CACHED_MODELS", 2)
    for threshold in (0.1, 0.2, 0.1, 0.3):
        builder.classify(threshold=threshold)
    assert (builder.trained, len(builder.files)) == (3, 2)
    builder.classify(threshold=0.1)
    assert builder.trained == 3
    builder.classify(threshold=0.2)
    assert builder.trained == 4
