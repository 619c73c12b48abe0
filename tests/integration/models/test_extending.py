"""Runs docs/extending.md: each snippet is merged into the shipped config and then used."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from aiohttp import web

from local.redis import RedisServer
from models_backend.process import start_backend
from router.answering.router import Answer, Router
from router.database import connect, rows
from router.models.roster import sync_roster
from router.settings.environment import DEFAULT_CONFIG_FOLDER, ROOT
from router.settings.router import load_config
from tests.support.command_line import CommandLine

DOC = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
TITLES = ("A new category", "A new model", "A new knowledge source", "Another backend")
SNIPPET = re.compile(r"`(config/[\w./-]+)`[^`\n]*(?:`[^`\n]*`[^`\n]*)?:\n\n```\w+\n(.*?)```", re.DOTALL)


def section(title: str) -> str:
    """Returns the section of this title."""
    text = DOC.split(f"\n## {title}\n")[1]
    return re.split(rf"\n## (?:{'|'.join(TITLES)})\n", text)[0]


def commands(text: str) -> list[list[str]]:
    """Returns the `router` commands of a section."""
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line.startswith("router ")]
    return [shlex.split(line)[1:] for line in lines]


def merged(below: Any, above: Any) -> Any:
    """Merges mappings, appends lists, and otherwise takes `above`."""
    if isinstance(below, dict) and isinstance(above, dict):
        return {**below, **{key: merged(below.get(key), value) for key, value in above.items()}}
    return [*below, *above] if isinstance(below, list) and isinstance(above, list) else above


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(DEFAULT_CONFIG_FOLDER, tmp_path / "config"))
    for examples in (folder / "examples").glob("*.jsonl"):  # enough to train on, and faster
        examples.write_text("\n".join(examples.read_text(encoding="utf-8").splitlines()[::6]) + "\n")
    return folder


def apply(title: str, folder: Path) -> str:
    """Writes the snippets of a section into the config in `folder`; returns the section."""
    text = section(title)
    snippets = SNIPPET.findall(text)
    assert snippets, f"no snippet under {title!r}"
    for name, content in snippets:
        file = folder.parent / name
        if file.suffix == ".yaml":
            whole = merged(yaml.safe_load(file.read_text(encoding="utf-8")), yaml.safe_load(content))
            file.write_text(yaml.safe_dump(whole, allow_unicode=True), encoding="utf-8")
        else:
            file.write_text(content, encoding="utf-8")
    return text


@pytest.fixture
def router(database: str, redis_server: RedisServer, folder: Path) -> CommandLine:
    return CommandLine(
        {
            "ROUTER_DATABASE_URL": database,
            "ROUTER_REDIS_URL": redis_server.url,
            "MODELS_BACKEND_URL": "http://127.0.0.1:1",
            "ROUTER_CONFIG": str(folder),
            "ROUTER_DATA": str(folder.parent / "data"),
        }
    )


async def asked(environment: dict[str, str], prompt: str, **options: Any) -> Answer:
    """Answers a prompt of the category `general`."""
    router = Router.from_config(environment=environment)
    await router.open(classify=False)
    try:
        return await router.answer(prompt, category="general", **options)
    finally:
        await router.close()


def test_new_category(router: CommandLine, folder: Path) -> None:
    text = apply("A new category", folder)
    explain, sync = commands(text)
    result = router(*explain, "--json")
    assert result.code == 0, result.err
    assert result.json["categorised"]["category"] == "support"
    assert router(*sync).code == 0
    with connect(router.environment["ROUTER_DATABASE_URL"]) as connection:
        places = rows(connection, "SELECT model FROM rankings WHERE category = 'support' ORDER BY place")
    assert [row["model"] for row in places] == ["llama-3.3-70b", "gpt-4o-mini"]


async def test_new_model(router: CommandLine, folder: Path, tmp_path: Path, redis_client: Any) -> None:
    text = apply("A new model", folder)
    for command in commands(text):
        result = router(*command)
        assert result.code == 0, result.err
    assert "llama-4-scout" in result.out
    backend = start_backend(
        tmp_path / "backend", "--models", str(folder / "models.yaml"), "--time-scale", "100"
    )
    try:
        environment = {**router.environment, "MODELS_BACKEND_URL": backend.url}
        answer = await asked(environment, "Why?", model="llama-4-scout")
    finally:
        backend.stop()
    assert answer.text.startswith("[llama-4-scout ")


def test_new_knowledge_source(router: CommandLine, folder: Path) -> None:
    text = apply("A new knowledge source", folder)
    (search,) = commands(text)
    result = router(*search)
    assert result.code == 0, result.err
    assert "Within 30 days of delivery" in result.out
    assert "returns.md" in result.out


class OtherBackend:
    """A backend with other paths and field names; records the requests."""

    def __init__(self) -> None:
        self.sent: list[dict[str, Any]] = []

    async def generate(self, request: web.Request) -> web.Response:
        self.sent.append(await request.json())
        outputs = [{"text": f"{self.sent[-1]['engine']} speaks"}]
        stats = {"read": 3, "written": 2, "dollars": 0.25}
        return web.json_response({"outputs": outputs, "stats": stats})


@pytest.fixture
async def other() -> AsyncIterator[tuple[OtherBackend, str]]:
    backend = OtherBackend()
    app = web.Application()
    app.router.add_post("/api/v2/generate", backend.generate)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    yield backend, f"http://{host}:{port}"
    await runner.cleanup()


async def test_another_backend(
    router: CommandLine, folder: Path, other: tuple[OtherBackend, str], redis_client: Any
) -> None:
    apply("Another backend", folder)
    backend, url = other
    with connect(router.environment["ROUTER_DATABASE_URL"]) as connection:
        sync_roster(connection, load_config(folder))
    environment = {**router.environment, "MODELS_BACKEND_URL": url}
    answer = await asked(environment, "Why is the sky blue?", model="phi-4", max_tokens=7)
    assert (answer.text, answer.cost_usd) == ("phi-4 speaks", 0.25)
    assert (answer.prompt_tokens, answer.completion_tokens) == (3, 2)
    (sent,) = backend.sent
    assert sent["input"] == {"text": "Why is the sky blue?", "limit": 7}
    assert set(sent["meta"]) == {"trace", "tokens"}


def test_invalid_config_is_reported_with_file_and_key(router: CommandLine, folder: Path) -> None:
    models, categories = folder / "models.yaml", folder / "categories.yaml"
    whole = {file: file.read_text(encoding="utf-8") for file in (models, categories)}
    for file, old, new, words in (
        (models, "  phi-4:\n", "  gpt-4o-mini:\n", "duplicate key 'gpt-4o-mini'"),
        (models, "{technical: 5,", "{sport: 5,", "models.phi-4.ranks.sport: no such category"),
        (models, "    single: /single", "    singel: /single", "backend.paths.singel"),
        (categories, "default_category: general", "default_category: sport", "'sport' is not among"),
    ):
        assert old in whole[file]
        file.write_text(whole[file].replace(old, new, 1), encoding="utf-8")
        result = router("models", "sync")
        assert result.code == 1
        assert str(file) in result.err
        assert words in result.err
        file.write_text(whole[file], encoding="utf-8")
    (folder / "examples" / "legal.jsonl").write_text(
        json.dumps({"prompt": "x", "category": "legal", "kind": "k"}), encoding="utf-8"
    )
    result = router("categories", "explain", "x")
    assert result.code == 1
    assert "legal.jsonl" in result.err
    assert "'legal' is not defined in categories.yaml" in result.err
