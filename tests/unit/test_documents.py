"""The documents name only what exists: links, paths of the repository, make targets, modules and verbs."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import typer.main

from router.cli.main import app

ROOT = Path(__file__).parents[2]
FOLDERS = "bench|config|dags|docs|local|models_backend|plugins|router|sql|tests"
DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md"))
)
WRITTEN_LATER = re.compile(  # by a benchmark, by the search, or by the reader of a how-to
    r"bench/results.*|config/discovered\.yaml|config/(?:examples|knowledge|trials)/[\w-]+\.\w+"
)

FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
SPAN = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\(([^()\s]+)\)")
PATH = re.compile(rf"(?:{FOLDERS})/[\w./-]*")
MAKE = re.compile(r"(?:^|[\s;&(])make ([a-z][a-z-]*)")
MODULE = re.compile(r"python3? -m ((?:bench|local|models_backend|router)[\w.]*)")
VERB = re.compile(r"(?:^|[;&(]\s*|bin/|run --rm init )router ([^#;&<>()]*)")


def code(text: str) -> Iterator[str]:
    """Every line of code in a document: code spans, and lines of fenced blocks of shell."""
    for language, block in FENCE.findall(text):
        if language in {"sh", "bash", "console"}:
            yield from block.replace("\\\n", " ").splitlines()
    yield from SPAN.findall(FENCE.sub("", text))


def anchors(text: str) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ +(.+?) *$", FENCE.sub("", text), re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", re.sub(r"\[(.*?)\]\(.*?\)", r"\1", heading)) for heading in headings)
    return {heading.lower().replace(" ", "-") for heading in plain}


def broken_links(text: str, folder: Path) -> Iterator[str]:
    for target in LINK.findall(SPAN.sub("", FENCE.sub("", text))):
        if "://" in target or target.startswith("mailto:"):
            continue
        name, _, anchor = target.partition("#")
        path = folder / name
        if name and not path.exists():
            yield f"link to {target}"
        elif anchor and anchor not in anchors(path.read_text(encoding="utf-8") if name else text):
            yield f"anchor of {target}"


def missing_paths(text: str) -> Iterator[str]:
    for line in code(text):
        for word in re.split(r"[\s'\"()|,]+", line):
            path = word.rstrip(".:;")
            expected = PATH.fullmatch(path) and not WRITTEN_LATER.fullmatch(path)
            if expected and not (ROOT / path).exists():
                yield f"path {path}"


@cache
def targets() -> frozenset[str]:
    """What `make` can make."""
    return frozenset(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@cache
def verbs() -> typer.main.TyperGroup:
    """The command line, as click sees it."""
    command = typer.main.get_command(app)
    assert isinstance(command, typer.main.TyperGroup)
    return command


def unknown_verbs(words: list[str]) -> Iterator[str]:
    """What a command line names that `router` does not know; `sync|search` names two verbs."""
    commands = [verbs()]
    for word in words:
        groups = [command for command in commands if isinstance(command, typer.main.TyperGroup)]
        if not groups or not re.fullmatch(r"[a-z]+(?:\|[a-z]+)*", word):
            break
        found = [group.commands.get(name) for group in groups for name in word.split("|")]
        if None in found:
            yield f"router {' '.join(words)}: no verb {word}"
            return
        commands = [command for command in found if command is not None]
    options = {option for command in commands for parameter in command.params for option in parameter.opts}
    for word in words:
        option = word.strip("[]").partition("=")[0]
        if re.fullmatch(r"--[a-z-]+", option) and option not in options | {"--help"}:
            yield f"router {' '.join(words)}: no option {option}"


def unknown_commands(text: str) -> Iterator[str]:
    for line in code(text):
        yield from (f"make {name}" for name in MAKE.findall(line) if name not in targets())
        for name in MODULE.findall(line):
            path = ROOT / name.replace(".", "/")
            if not (path.with_suffix(".py").exists() or (path / "__main__.py").exists()):
                yield f"python -m {name}"
        for rest in VERB.findall(line):
            words = rest.split()
            if words and words[0] not in {"...", "VERB"}:
                yield from unknown_verbs(words)


def assert_none(problems: Iterator[str]) -> None:
    """Fail with one line per problem."""
    found = list(problems)
    assert not found, "\n".join(found)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_to_a_file_and_a_heading(document: str) -> None:
    path = ROOT / document
    assert_none(broken_links(path.read_text(encoding="utf-8"), path.parent))


@pytest.mark.parametrize("document", DOCUMENTS)
def test_paths_exist(document: str) -> None:
    assert_none(missing_paths((ROOT / document).read_text(encoding="utf-8")))


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_exist(document: str) -> None:
    assert_none(unknown_commands((ROOT / document).read_text(encoding="utf-8")))


def test_the_architecture_lists_every_package_with_its_charter() -> None:
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    listed = dict(re.findall(r"^\| \[`(\w+)`\]\(\S+/__init__\.py\) \| (.+?) \|$", text, re.MULTILINE))
    packages = (path.parent.name for path in (ROOT / "router").glob("*/__init__.py"))
    assert listed == {
        name: (importlib.import_module(f"router.{name}").__doc__ or "").strip() for name in packages
    }


def test_the_architecture_lists_every_top_level_module_with_its_first_sentence() -> None:
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    listed = dict(re.findall(r"^\| \[`(\w+)`\]\(\.\./router/\w+\.py\) \| (.+?) \|$", text, re.MULTILINE))
    names = (path.stem for path in (ROOT / "router").glob("*.py") if path.stem != "__init__")
    docstrings = ((name, importlib.import_module(f"router.{name}").__doc__ or "") for name in names)
    assert listed == {name: re.split(r"(?<=\.)\s", docstring)[0] for name, docstring in docstrings}


def test_the_architecture_states_the_import_rule_of_the_contract() -> None:
    contract = (ROOT / "pyproject.toml").read_text(encoding="utf-8").split("layers = [")[1].split("]")[0]
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    assert "\n".join(re.findall(r'"(.+)"', contract)) in text


def test_broken_references_are_found() -> None:
    text = """
# A heading

[one](nowhere.md), [two](#no-heading), [three](#a-heading), [four](docs/glossary.md#nothing)
`router/nowhere.py`, `config/models.yaml`, `make nothing`, `python -m bench.nothing`
`router nothing`, `router models search|nothing`, `router models search --dry-run`, `router status --nothing`

```sh
router models nothing  # not router nowhere
make demo && router nothing
python bench/nothing.py
```
"""
    assert list(broken_links(text, ROOT)) == [
        "link to nowhere.md", "anchor of #no-heading", "anchor of docs/glossary.md#nothing"
    ]  # fmt: skip
    assert list(missing_paths(text)) == ["path bench/nothing.py", "path router/nowhere.py"]
    assert list(unknown_commands(text)) == [
        "router models nothing: no verb nothing",
        "router nothing: no verb nothing",
        "make nothing",
        "python -m bench.nothing",
        "router nothing: no verb nothing",
        "router models search|nothing: no verb search|nothing",
        "router status --nothing: no option --nothing",
    ]
