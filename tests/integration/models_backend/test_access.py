"""The stand-in serves programs that know its token, and no web pages."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from starlette.datastructures import Headers

from models_backend.access import Access, refusal
from models_backend.process import BackendServer, start_backend
from models_backend.settings import access_from_environment
from router.errors import ConfigError
from router.models.backend import ModelsBackend
from router.settings.router import BackendSettings
from router.task import Outcome
from tests.support.calls import call_request

TOKEN = "a-token-of-some-length"
JSON = {"content-type": "application/json"}
HERE = {"host": "127.0.0.1:8100"}
CALL = {"model": "phi-4", "prompt": "Why?", "max_tokens": 5}


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({**HERE, **JSON}, None),
        ({**HERE, "content-type": "application/json; charset=utf-8"}, None),
        ({"host": "[::1]:8100", **JSON}, None),
        ({"host": "localhost:8100", **JSON}, None),
        ({"host": "models-backend:8100", **JSON}, None),  # the name of a service
        ({"host": "10.1.2.3", **JSON}, None),
        ({"host": "backend.example.org", **JSON}, None),  # allowed by name
        ({"host": "evil.example:8100", **JSON}, 403),  # a name that was bound to this address
        ({"host": "", **JSON}, 403),
        (JSON, 403),
        ({"host": "[", **JSON}, 403),
        ({**HERE, **JSON, "origin": "http://evil.example"}, 403),
        ({**HERE, **JSON, "origin": "null"}, 403),
        ({**HERE, **JSON, "origin": "http://127.0.0.1:8100"}, None),  # its own page of documentation
        ({**HERE, **JSON, "sec-fetch-site": "cross-site"}, 403),
        ({**HERE, **JSON, "sec-fetch-site": "same-site"}, 403),
        # What a form or a script of any page can send without being asked first.
        ({**HERE, "content-type": "text/plain"}, 415),
        ({**HERE, "content-type": "application/x-www-form-urlencoded"}, 415),
        ({**HERE, "content-type": "multipart/form-data; boundary=x"}, 415),
        (HERE, 415),
    ],
)
def test_web_pages_are_not_served(headers: dict[str, str], status: int | None):
    access = Access(hosts=frozenset({"backend.example.org"}))
    found = refusal("POST", "/single", Headers(headers), access)
    assert (found and found[0]) == status


@pytest.mark.parametrize(
    ("sent", "status"),
    [(None, 401), ("", 401), (TOKEN, 401), (f"Bearer {TOKEN}", None), (f"bearer {TOKEN}", None),
     (f"Bearer {TOKEN[:-1]}", 401), ("Bearer ", 401), (f"Basic {TOKEN}", 401)],
)  # fmt: skip
def test_a_token_is_required_where_there_is_one(sent: str | None, status: int | None):
    headers = {**HERE, **JSON, **({} if sent is None else {"authorization": sent})}
    found = refusal("POST", "/single", Headers(headers), Access(TOKEN))
    assert (found and found[0]) == status
    assert refusal("GET", "/health", Headers(HERE), Access(TOKEN)) is None


@pytest.mark.parametrize("token", ["short", "a token with spaces", "täglich" * 5])
def test_a_token_that_is_no_secret_is_rejected(token: str):
    with pytest.raises(ConfigError, match="MODELS_BACKEND_TOKEN") as error:
        access_from_environment({"MODELS_BACKEND_TOKEN": token}, [])
    assert token not in str(error.value)


@pytest.fixture
def guarded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[BackendServer]:
    monkeypatch.setenv("MODELS_BACKEND_TOKEN", TOKEN)
    server = start_backend(tmp_path, "--time-scale", "200")
    yield server
    server.stop()


async def test_the_router_sends_the_token(guarded: BackendServer):
    command = Path(f"/proc/{guarded.process.pid}/cmdline").read_bytes()
    assert TOKEN.encode() not in command
    async with ModelsBackend(guarded.url, BackendSettings(), token=TOKEN) as backend:
        assert "phi-4" in await backend.models()
        assert (await backend.call(call_request("phi-4", "Why?"))).outcome is Outcome.ANSWERED
    async with ModelsBackend(guarded.url, BackendSettings()) as backend:
        result = await backend.call(call_request("phi-4", "Why?"))
        assert result.outcome is not Outcome.ANSWERED
        assert TOKEN not in str(result)
    assert requests.get(f"{guarded.url}/faults", timeout=5).status_code == 401
    guarded.stop()
    assert TOKEN not in (guarded.arrival_log.parent / "models_backend.log").read_text()


def test_only_json_is_read(guarded: BackendServer):
    def send(kind: str, **more: Any) -> int:
        headers = {"authorization": f"Bearer {TOKEN}", "content-type": kind, **more}
        return requests.post(
            f"{guarded.url}/single", data=json.dumps(CALL), headers=headers, timeout=10
        ).status_code

    assert send("application/json") == 200
    assert send("text/plain") == 415
    assert send("application/json", host="evil.example") == 403
