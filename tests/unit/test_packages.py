"""Rules for packages and modules beyond the import contracts."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("router", "models_backend", "local", "bench", "plugins", "dags")
PACKAGES = sorted(path.parent.name for path in (ROOT / "router").glob("*/__init__.py"))
MAX_LINES = 400
MAX_ENTRIES = 23


def modules() -> dict[str, Path]:
    """Returns every module of the product by its import name."""
    found = {}
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            # Airflow puts these two folders on the path.
            base = ROOT / folder if folder in {"plugins", "dags"} else ROOT
            parts = path.relative_to(base).with_suffix("").parts
            found[".".join(part for part in parts if part != "__init__")] = path
    return found


MODULES = modules()
PURE = frozenset(
    re.findall(
        r'"(router[.\w]+)"',
        re.split(
            r"source_modules|forbidden_modules",
            (ROOT / "pyproject.toml").read_text().split("Decisions are pure")[1],
        )[1],
    )
)


def imported(module: str) -> Iterator[str]:
    """Yields the product's modules that this one imports, at any level of the file."""
    path = MODULES[module]
    if path.with_suffix(".pyi").exists():
        path = path.with_suffix(".pyi")
    package = module if path.stem == "__init__" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join(
                    [*package.split(".")[: len(package.split(".")) - node.level + 1], base]
                ).strip(".")
            names = [
                f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base for alias in node.names
            ]
        else:
            continue
        yield from (name for name in names if name in MODULES and name != module)


GRAPH = {module: frozenset(imported(module)) for module in MODULES}


def cycle(graph: dict[str, frozenset[str]]) -> list[str]:
    """Returns one cycle of the graph, or an empty list."""
    done: set[str] = set()

    def visit(node: str, path: list[str]) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node not in done:
            for other in sorted(graph[node]):
                if found := visit(other, [*path, node]):
                    return found
            done.add(node)
        return []

    return next(filter(None, (visit(node, []) for node in sorted(graph))), [])


def test_router_has_few_entries() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "router"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.split()
    assert len({name.split("/")[1] for name in listed}) <= MAX_ENTRIES


@pytest.mark.parametrize("package", PACKAGES)
def test_package_docstring_is_one_sentence(package: str) -> None:
    charter = importlib.import_module(f"router.{package}").__doc__ or ""
    assert charter.strip().endswith(".")
    assert "\n" not in charter.strip()


@pytest.mark.parametrize("package", PACKAGES)
def test_public_names_of_a_package_can_be_imported(package: str) -> None:
    face = importlib.import_module(f"router.{package}")
    assert face.__all__
    for name in face.__all__:
        assert getattr(face, name).__class__ is not type(face), (
            f"{name} is a module, not what the type checker sees"
        )


def test_packages_import_each_other_by_public_names() -> None:
    """Pure modules name files, because the import contracts do not look behind a package's lazy names."""
    reached_into = []
    for module, others in GRAPH.items():
        own = module.split(".")[:2]
        for other in others:
            parts = other.split(".")
            inside = parts[0] == "router" and len(parts) > 2 and parts[1] in PACKAGES
            lazy = parts[0] == "router" and (MODULES[other].with_suffix(".pyi")).exists()
            if lazy if module in PURE else inside and parts[:2] != own and not module.startswith("bench"):
                reached_into.append(f"{module} imports {other}")
    assert not reached_into


def test_top_level_folders_have_no_import_cycle() -> None:
    folders = {path: path.relative_to(ROOT).parts[0] for path in MODULES.values()}
    graph: dict[str, set[str]] = {folder: set() for folder in FOLDERS}
    for module, others in GRAPH.items():
        folder = folders[MODULES[module]]
        graph[folder] |= {folders[MODULES[other]] for other in others} - {folder}
    assert not cycle({folder: frozenset(others) for folder, others in graph.items()})


def test_modules_have_no_import_cycle() -> None:
    # A package's __init__ imports its own modules, and they may import the package's parent.
    graph = {
        module: frozenset(
            other
            for other in others
            if not module.startswith(f"{other}.") and not other.startswith(f"{module}.")
        )
        for module, others in GRAPH.items()
    }
    assert not cycle(graph)


def test_no_file_exceeds_the_maximum_length() -> None:
    listed = subprocess.run(
        ["git", "ls-files", *FOLDERS, "sql"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.split()
    long = {
        name: lines
        for name in listed
        if name.endswith((".py", ".js", ".sql", ".css", ".html", ".lua"))
        and name != "router/limiter/limiter.lua"
        if (lines := (ROOT / name).read_text(encoding="utf-8").count("\n")) > MAX_LINES
    }
    assert not long
