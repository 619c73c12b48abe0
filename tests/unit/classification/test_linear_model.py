"""What was learned is kept: taken again only where the same would be learned, and not when broken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from router.classification import linear_model as classifier
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
    told = [("cooking", f"How do I cook {dish}?") for dish in ("soup", "bread", "cake", "stew")]
    told += [("sport", f"What are the rules of {game}?") for game in ("chess", "tennis", "rowing", "judo")]
    lines = [{"prompt": prompt, "category": category, "kind": "x"} for category, prompt in told]
    (folder / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


class Builder:
    """Builds categorisers that keep what they learn in one folder, and counts how often they do learn."""

    def __init__(self, config: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.config, self.folder, self.learned = config, folder, 0
        learn = LinearModel.learn

        def counted(*values: Any) -> LinearModel:
            self.learned += 1
            return learn(*values)

        monkeypatch.setattr(LinearModel, "learn", counted)

    def told(self, **changes: Any) -> list[Classification]:
        settings = load_categories(self.config).model_copy(update=changes)
        return Classifier.build(settings, self.folder).classify_many(PROMPTS)

    @property
    def files(self) -> list[Path]:
        return sorted(self.folder.iterdir())


@pytest.fixture
def builder(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Builder:
    return Builder(config, tmp_path / "learned", monkeypatch)


def test_what_was_learned_is_taken_again_and_tells_the_same(builder: Builder) -> None:
    told = builder.told()
    assert builder.told() == told
    assert builder.learned == 1
    assert len(builder.files) == 1
    assert told == Classifier.build(load_categories(builder.config)).classify_many(PROMPTS)


def test_other_examples_settings_code_or_libraries_are_learned_anew(
    builder: Builder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    builder.told()
    builder.told(rules=(RuleSettings(category="sport", pattern="goose"),))
    assert builder.learned == 2
    examples = builder.config / "a.jsonl"
    examples.write_text(examples.read_text().replace("judo", "golf"))
    builder.told()
    assert builder.learned == 3
    with monkeypatch.context() as patch:
        patch.setattr("router.classification.classifier.version", lambda library: f"another {library}")
        builder.told()
    assert builder.learned == 4
    edited = tmp_path / "classifier.py"
    edited.write_bytes(Path(classifier.__file__).read_bytes() + b"# edited\n")
    monkeypatch.setattr(classifier, "__file__", str(edited))
    builder.told()
    assert builder.learned == 5


def test_the_same_in_another_folder_is_the_same(builder: Builder, tmp_path: Path) -> None:
    builder.told()
    builder.config = builder.config.rename(tmp_path / "moved")
    builder.told()
    assert builder.learned == 1


@pytest.mark.parametrize("how", ["empty", "cut off", "a bit", "no archive", "an array too few", "objects"])
def test_what_is_broken_is_learned_anew_and_replaced(builder: Builder, how: str) -> None:
    told = builder.told()
    (file,) = builder.files
    whole = file.read_bytes()
    with np.load(file) as arrays:
        kept = dict(arrays)
    if how == "objects":  # would have to be unpickled, which is how foreign code gets in
        kept["intercepts"] = np.array([object()], dtype=object)
    elif how == "an array too few":
        del kept["intercepts"]
    if how in ("objects", "an array too few"):
        np.savez(file, **kept)
    else:
        middle = len(whole) // 2
        flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
        broken = {"empty": b"", "cut off": whole[:-900], "a bit": flipped, "no archive": b"x" * 5000}
        file.write_bytes(broken[how])
    assert builder.told() == told
    assert builder.learned == 2
    assert builder.told() == told
    assert builder.learned == 2


def test_where_nothing_can_be_kept_it_is_learned_each_time(builder: Builder) -> None:
    builder.folder.write_text("in the way")
    assert builder.told() == builder.told()
    assert builder.learned == 2
    assert builder.folder.read_text() == "in the way"


def test_a_few_are_kept_those_that_were_used_last(builder: Builder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classifier, "CACHED_MODELS", 2)
    for threshold in (0.1, 0.2, 0.1, 0.3):
        builder.told(threshold=threshold)
    assert (builder.learned, len(builder.files)) == (3, 2)
    builder.told(threshold=0.1)
    assert builder.learned == 3
    builder.told(threshold=0.2)
    assert builder.learned == 4
