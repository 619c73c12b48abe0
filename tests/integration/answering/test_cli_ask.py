"""`router ask` and `router log` as programs, on real services."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from local.redis import RedisServer
from models_backend.process import BackendServer, start_backend
from router.database import connect, rows
from tests.support.command_line import CommandLine

PREFERRED, CHEAP = "llama-3.3-70b", "llama-3.1-8b"  # for general prompts, in the shipped config


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BackendServer]:
    folder = tmp_path_factory.mktemp("backend")
    server = start_backend(folder, "--time-scale", "20", "--latency", "even:2:4")
    yield server
    server.stop()


@pytest.fixture
def router(
    database: str, redis_server: RedisServer, redis_client: object, backend: BackendServer, trained_data: Path
) -> Iterator[CommandLine]:
    yield CommandLine(
        {
            "ROUTER_DATABASE_URL": database,
            "ROUTER_REDIS_URL": redis_server.url,
            "MODELS_BACKEND_URL": backend.url,
            "ROUTER_DATA": str(trained_data),
        }
    )
    requests.delete(f"{backend.url}/faults", timeout=5)


def run(router: CommandLine, *arguments: str, typed: str = "") -> tuple[int, str, str]:
    """Exit code, standard output and standard error of the program."""
    process = router.start(*arguments)
    out, err = process.communicate(typed.encode(), timeout=90)
    return process.returncode, out.decode(), err.decode()


def hang(backend: BackendServer, model: str) -> None:
    order = {"kind": "hang", "model": model, "share": 1, "seconds": 600}
    requests.post(f"{backend.url}/faults", json=order, timeout=5).raise_for_status()


def logged(router: CommandLine, *arguments: str) -> list[dict[str, Any]]:
    return list(router("log", "--json", *arguments).json["calls"])


def test_events_go_to_standard_error_and_the_answer_to_standard_output(router: CommandLine) -> None:
    code, out, err = run(router, "ask", "--category", "general", "-", typed="Why is the sky blue?\n")
    assert code == 0
    assert "Why is the sky blue?" in out  # the simulated models repeat the prompt in good answers
    for line in (
        "general (1.00): given by the caller",
        f"calling {PREFERRED} (preferred model)",
        f"calling {CHEAP} (fallback)",
        f"sent to {PREFERRED}",
        f"{PREFERRED} (chosen model)",
        "task 1",
    ):
        assert line in err
    assert "Unclosed" not in err, "connections are closed before the program ends"


def test_json_output_and_the_call_log(router: CommandLine, database: str) -> None:
    code, out, _ = run(router, "ask", "--json", "Write a haiku about the sea")
    found = json.loads(out)
    assert code == 0
    assert (found["category"], found["rank"], found["is_fallback"]) == ("creative", "chosen_model", False)
    assert (found["provisional"], found["late"], found["task_id"]) == (False, None, 1)
    assert found["confidence"] > 0.5
    with connect(database) as connection:
        (task,) = rows(connection, "SELECT * FROM tasks")
    assert (task["answer"], task["category"]) == (found["answer"], "creative")

    calls = {call["role"]: call for call in logged(router, "--task", "1")}
    assert set(calls) == {"asked", "fallback"}
    assert calls["asked"]["call_id"] == found["calls"][0]["call_id"]
    assert calls["asked"]["confidence"] == pytest.approx(found["confidence"], abs=1e-3)
    assert logged(router, "--model", "phi-4") == []
    assert len(logged(router, "--category", "creative", "--since", "1h")) == 2
    assert logged(router, "--category", "technical") == []
    table = router("log", "--limit", "1").out
    assert found["model"] in table or CHEAP in table


@pytest.mark.soak
def test_late_option_limits_the_wait(router: CommandLine, backend: BackendServer) -> None:
    hang(backend, PREFERRED)
    asked = ("ask", "--json", "--category", "general", "--deadline", "6", "--late", "0.5", "Why?")
    code, out, _ = run(router, *asked)
    found = json.loads(out)
    assert (code, found["model"], found["provisional"], found["late"]) == (0, CHEAP, True, None)
    by_role = {call["role"]: call for call in logged(router)}
    assert (by_role["asked"]["outcome"], by_role["asked"]["error"]) == ("abandoned", "the router was closed")


def test_control_c_cancels_the_calls(router: CommandLine, backend: BackendServer) -> None:
    hang(backend, "*")
    process = router.start("ask", "--category", "general", "Why?")
    assert process.stderr is not None
    shown = b""
    end = time.monotonic() + 60
    while b"sent to" not in shown:
        assert time.monotonic() < end
        shown += process.stderr.read1(4096)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode != 0
    assert b"Traceback" not in err
    outcomes = {call["outcome"] for call in logged(router)}
    assert "abandoned" in outcomes
    assert outcomes <= {"abandoned", "unsent"}


@pytest.mark.parametrize(
    ("arguments", "typed", "words"),
    [
        ((" ",), "", "The prompt is empty"),
        (("-",), "x" * 2_000_000, "Standard input is longer than 1048576 bytes"),
        (("--deadline", "0", "Why?"), "", "The deadline must be 0.05 to 3600 s, not 0 s"),
        (("--category", "poetry", "Why?"), "", "There is no category 'poetry'"),
        (("--model", "gpt-5", "--deadline", "1", "Why?"), "", "There is no model in use 'gpt-5'"),
    ],
)
def test_invalid_input_is_one_message(
    router: CommandLine, arguments: tuple[str, ...], typed: str, words: str
) -> None:
    result = router("ask", *arguments, answer=typed)
    assert (result.code, result.out) == (1, "")
    assert words in result.err


def test_invalid_log_options_are_reported(router: CommandLine) -> None:
    assert "is not an age" in router("log", "--since", "soon").err
    assert "did you mean 'technical'" in router("log", "--category", "technicl").err
    assert "no matching calls" in router("log").out


@pytest.mark.parametrize("as_json", [False, True])
def test_a_prompt_that_no_model_answers_is_a_failure(
    router: CommandLine, backend: BackendServer, as_json: bool
) -> None:
    order = {"kind": "error", "model": "*", "share": 1, "seconds": 600}
    requests.post(f"{backend.url}/faults", json=order, timeout=5).raise_for_status()
    options = ("--json",) if as_json else ()
    code, out, err = run(router, "ask", *options, "--category", "general", "qqqq zzzz?")
    assert code == 1
    assert "No model answered in time, and no relevant passages were found" in err
    assert (json.loads(out)["model"] is None) if as_json else (out == "")
    assert router("status", "--json").json["tasks"]["failed"] == 0
    assert "0 tasks requeued" in router("retry", "--all", "--yes").out
