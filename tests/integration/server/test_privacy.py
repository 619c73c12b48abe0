"""Two API keys: nothing of one client's prompts and answers reaches the other, whatever it asks for."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from models_backend.process import BackendServer
from router.database import connect, rows
from router.knowledge import Knowledge
from router.server.key_file import add_key
from tests.support.command_line import CommandLine
from tests.support.serving import EVERY_CATEGORY, Serving, serving
from tests.support.waiting import until

CANARY = "xylophone-7431"
QUESTION = "Which secret code opens the vault of the harbor office?"
CATEGORIES = ("auto", *(f"auto:{name}" for name in EVERY_CATEGORY))
DEADLINES = (0.05, 0.3, 1.5)
SECRETS = re.compile(r"xylophone|7431|invoice-of-alice|\btask ([1-9]|1\d|20)\b|/tmp/|/home/")


@pytest.fixture(scope="module")
def two_clients(
    services: dict[str, str], backend: BackendServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Serving, str]]:
    """A server over an index with solved tasks of alice; and the key of bob."""
    with connect(services["ROUTER_DATABASE_URL"]) as connection:
        for number in range(20):
            rows(
                connection,
                "INSERT INTO tasks (prompt, status, answer, client, external_id)"
                " VALUES (%s, 'solved', %s, 'alice', %s)",
                (f"{QUESTION} Number {number}.", f"The code is {CANARY}.", f"invoice-of-alice-{number}"),
            )
    asyncio.run(build_index(services))
    folder = tmp_path_factory.mktemp("two")
    with serving(folder, services, backend, "--at-once", "40") as server:
        yield server, add_key(server.keys_file, "bob")


async def build_index(services: dict[str, str]) -> None:
    opening = Knowledge.open(
        Path(services["ROUTER_CONFIG"]) / "knowledge", database_url=services["ROUTER_DATABASE_URL"],
        data_folder=Path(services["ROUTER_DATA"]), keep_updated=False,
    )  # fmt: skip
    async with opening as knowledge:
        assert await knowledge.update()
        assert CANARY in (await knowledge.search(QUESTION, client="alice")).as_answer()


def ask(server: Serving, key: str, model: str, deadline: float, **more: Any) -> str:
    """Returns the whole response, with its headers."""
    body = {
        "model": model, "messages": [{"role": "user", "content": QUESTION}],
        "router": {"deadline_seconds": deadline}, **more,
    }  # fmt: skip
    response = server.post(key=key, json=body)
    return f"{response.status_code} {dict(response.headers)} {response.text}"


def check(text: str) -> None:
    assert SECRETS.search(text) is None, text


@pytest.mark.parametrize("fault", ["hang", "error", None], ids=str)
def test_no_answer_error_or_passage_holds_anothers_text(two_clients: tuple[Serving, str], fault: str | None):
    server, bob = two_clients
    until(lambda: server.post(key=bob, json={}).status_code == 400, 10)
    if fault is not None:
        server.fault(fault, seconds=600)
    try:
        for model, deadline in itertools.product(CATEGORIES, DEADLINES):
            check(ask(server, bob, model, deadline))
        check(ask(server, bob, "auto", 0.3, stream=True))
        check(ask(server, bob, "phi-4", 0.3))
        check(ask(server, bob, "no-such-model", 0.3))
    finally:
        requests.delete(f"{server.backend.url}/faults", timeout=5)
    check(json.dumps(server.rows("SELECT answer FROM tasks WHERE client = 'bob'")))
    check(json.dumps(server.rows("SELECT error FROM model_calls WHERE client = 'bob'")))


def test_a_fallback_model_is_not_sent_anothers_text(two_clients: tuple[Serving, str]):
    # The simulated models repeat the prompt in good answers, and so the passages that it holds.
    server, bob = two_clients
    server.fault("hang", "qwen-2.5-72b", seconds=600)
    try:
        for model in CATEGORIES:
            check(ask(server, bob, model, 1.5))
    finally:
        requests.delete(f"{server.backend.url}/faults", timeout=5)


def test_a_client_finds_its_own_tasks(two_clients: tuple[Serving, str]):
    server, _ = two_clients
    alice = add_key(server.keys_file, "alice")
    until(lambda: server.post(key=alice, json={}).status_code == 400, 10)
    server.fault("hang", seconds=600)
    try:
        assert CANARY in ask(server, alice, "auto", 0.3)
    finally:
        requests.delete(f"{server.backend.url}/faults", timeout=5)


def test_the_command_line_shows_a_client_what_is_its_own(
    two_clients: tuple[Serving, str], services: dict[str, str]
):
    server, bob = two_clients
    until(lambda: "200" in ask(server, bob, "phi-4", 5), 10)
    router = CommandLine(services)
    for arguments in (("log", "--json"), ("log",), ("export", "-")):
        shown = router(*arguments, "--client", "bob").out
        assert "phi-4" in shown
        check(shown)
    check(router("knowledge", "search", QUESTION, "--client", "bob").out)
    assert CANARY in router("knowledge", "search", QUESTION, "--client", "alice").out
    assert CANARY in router("export", "-", "--client", "alice").out
