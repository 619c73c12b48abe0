"""One client's half-sent bodies and idle connections do not slow another's requests down: side by side."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import requests

from models_backend.process import BackendServer, start_backend
from router.server.key_file import add_key
from tests.support.serving import Serving, serving
from tests.support.stack import say
from tests.support.waiting import until

ROOT = Path(__file__).parents[3]
ROUNDS, REQUESTS = 4, 75
CHAT = {"model": "phi-4", "messages": [{"role": "user", "content": "Why?"}], "max_tokens": 5}
MOST_TIMES = 1.5


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BackendServer]:
    """A backend whose every answer takes 20 ms: what varies is the server."""
    server = start_backend(tmp_path_factory.mktemp("backend"), "--time-scale", "50", "--latency", "even:1:1")
    yield server
    server.stop()


@contextmanager
def flood(server: Serving, key: str) -> Iterator[None]:
    """64 half-sent bodies and 2,000 idle connections of one client."""
    host, _, port = server.url.removeprefix("http://").partition(":")
    command = [sys.executable, "-m", "tests.support.connection_flood", host, port, key]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == b"ready\n"
            yield
        finally:
            process.kill()


def latencies(session: requests.Session, url: str) -> list[float]:
    taken = []
    for _ in range(REQUESTS):
        began = time.perf_counter()
        reply = session.post(f"{url}/v1/chat/completions", json=CHAT, timeout=30)
        taken.append(time.perf_counter() - began)
        assert reply.status_code == 200, reply.text
    return taken


def quantile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


@pytest.mark.soak
@pytest.mark.alone
@pytest.mark.timeout(300)
def test_one_clients_connections_leave_anothers_latency(
    services: dict[str, str], backend: BackendServer, tmp_path: Path
) -> None:
    with serving(tmp_path, services, backend) as server, requests.Session() as session:
        alice, bob = add_key(server.keys_file, "alice"), add_key(server.keys_file, "bob")
        session.headers["Authorization"] = f"Bearer {bob}"
        until(lambda: session.get(f"{server.url}/v1/models", timeout=5).ok, 10)
        latencies(session, server.url)  # warms up
        quiet: list[float] = []
        flooded: list[float] = []
        for _ in range(ROUNDS):  # side by side, since other load comes and goes
            quiet += latencies(session, server.url)
            with flood(server, alice):
                flooded += latencies(session, server.url)
        assert "Too many open files" not in server.log
    for share in (0.5, 0.99):
        before, during = quantile(quiet, share), quantile(flooded, share)
        times = f"{before * 1000:.1f} ms alone, {during * 1000:.1f} ms beside the flood"
        say(f"p{share * 100:g}: {times}: {during / before:.2f} x")
    assert quantile(flooded, 0.99) <= MOST_TIMES * quantile(quiet, 0.99)
