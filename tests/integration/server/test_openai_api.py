"""`router serve` as a process, used through the unchanged `openai` package."""

from __future__ import annotations

import asyncio
import http.client
import json
import signal
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import openai
import pytest
import requests
import yaml

from models_backend.process import BackendServer
from router.server.key_file import add_key, remove_keys
from router.traffic import TrafficTarget
from tests.support.command_line import CommandLine
from tests.support.serving import CODE, Serving, config_folder, serving
from tests.support.waiting import until


def test_a_completion_reports_its_routing(server: Serving) -> None:
    raw = server.client.chat.completions.with_raw_response.create(
        model="auto",
        messages=[{"role": "user", "content": CODE}],
        extra_body={"router": {"deadline_seconds": 20}},
    )
    completion = raw.parse()
    assert completion.model == "qwen-2.5-72b"
    assert (completion.choices[0].message.content or "").startswith("[qwen-2.5-72b ")
    assert completion.choices[0].finish_reason == "stop"
    assert completion.usage is not None
    assert completion.usage.total_tokens > completion.usage.prompt_tokens > 0
    routing = completion.router  # type: ignore[attr-defined]
    assert routing["category"] == "technical", routing
    assert (routing["preferred"], routing["fallback"]) == ("qwen-2.5-72b", "phi-4")
    assert routing["provisional"] is False
    assert raw.headers["x-router-category"] == routing["category"]
    assert raw.headers["x-router-model"] == "qwen-2.5-72b"
    task = server.rows("SELECT prompt, status FROM tasks WHERE id = %s", int(raw.headers["x-router-task"]))
    assert task == [{"prompt": CODE, "status": "solved"}]


def test_a_stream_has_role_chunks_reason_and_usage(server: Serving) -> None:
    chunks = list(server.chat(stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text.startswith(f"[{chunks[0].model} ")
    reasons = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    assert reasons == [*[None] * (len(reasons) - 1), "stop"]
    assert [chunk.usage is not None for chunk in chunks] == [*[False] * (len(chunks) - 1), True]
    assert {chunk.id for chunk in chunks} == {chunks[0].id}


def test_models_lists_auto_and_the_models_in_use(server: Serving) -> None:
    names = [model.id for model in server.client.models.list()]
    assert names[:2] == ["auto", "auto:creative"]
    assert set(names) > {"qwen-2.5-72b", "phi-4"}
    assert server.client.models.retrieve("auto:technical").id == "auto:technical"
    with pytest.raises(openai.NotFoundError):
        server.client.models.retrieve("gpt-9")


def test_a_model_or_category_can_be_chosen(server: Serving) -> None:
    assert server.chat(model="phi-4").model == "phi-4"
    assert server.chat(CODE, model="auto:creative").router["category"] == "creative"


def test_the_owner_of_the_key_is_the_client_of_task_and_calls(server: Serving) -> None:
    task_id = server.chat(model="phi-4").router["task_id"]
    task = server.rows("SELECT client FROM tasks WHERE id = %s", task_id)
    calls = server.rows("SELECT DISTINCT client FROM model_calls WHERE task_id = %s", task_id)
    assert task == calls == [{"client": "tester"}]


def test_optional_parameters(server: Serving) -> None:
    completion = server.client.chat.completions.create(
        model="phi-4",
        messages=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}],
        max_completion_tokens=12, temperature=0.2, seed=1, user="u", stop=["zzz"],
        extra_body={"router": {"deadline_seconds": 3}},
    )  # fmt: skip
    assert completion.choices[0].finish_reason == "length"
    prompt = server.rows("SELECT prompt FROM tasks WHERE id = %s", completion.router["task_id"])  # type: ignore[attr-defined]
    assert prompt == [{"prompt": "Be brief.\n\nWhy?"}]


def test_a_hanging_model_yields_a_provisional_answer(server: Serving) -> None:
    server.fault("hang", "qwen-2.5-72b")
    with server.client.chat.completions.with_streaming_response.create(
        model="auto", messages=[{"role": "user", "content": "Why?"}], stream=True
    ) as raw:
        lines = list(raw.iter_lines())
    assert lines[0].startswith('data: {"id"')
    assert lines.count(": waiting") >= 3
    assert lines.index(": waiting") < next(n for n, line in enumerate(lines) if "[phi-4 " in line)
    assert [line for line in lines if line][-1] == "data: [DONE]"
    whole = server.post(json={"model": "auto", "messages": MESSAGES, "router": {"deadline_seconds": 1}})
    assert whole.headers["x-router-provisional"] == "true"
    assert whole.headers["x-router-model"] == whole.json()["model"] == "phi-4"
    assert whole.json()["router"]["provisional"] is True


def test_the_next_model_replaces_a_failed_one(server: Serving) -> None:
    server.fault("error", "qwen-2.5-72b")
    assert server.chat().model == "phi-4"


async def test_concurrent_requests(server: Serving) -> None:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=server.key, max_retries=0) as client:
        requests_sent = [
            client.chat.completions.create(model="phi-4", messages=[{"role": "user", "content": f"{n}?"}])
            for n in range(15)
        ]
        answers = await asyncio.gather(*requests_sent)
    assert {answer.model for answer in answers} == {"phi-4"}
    assert len({answer.choices[0].message.content for answer in answers}) == 15


def test_a_disconnected_client_cancels_its_calls(server: Serving) -> None:
    server.fault("hang")
    began = server.log.count("canceled after")
    with pytest.raises(openai.APITimeoutError):
        server.chat("Nobody waits for this.", timeout=0.5)
    stream = server.chat("Nor for this.", stream=True)
    next(iter(stream))
    stream.close()
    until(lambda: server.log.count("the client disconnected before there was an answer") == began + 2, 10)
    calls = (
        "SELECT outcome FROM model_calls JOIN tasks t ON t.id = task_id WHERE t.prompt LIKE 'N%% this.'"
        " AND role = 'asked'"
    )
    until(lambda: [row["outcome"] for row in server.rows(calls)] == ["abandoned"] * 2, 10)


def test_a_disconnect_in_the_middle_of_a_request(server: Serving) -> None:
    host = server.url.removeprefix("http://")
    for sent in (b"", b'{"model": "auto", "mess'):
        connection = http.client.HTTPConnection(host, timeout=5)
        connection.putrequest("POST", "/v1/chat/completions")
        connection.putheader("Authorization", f"Bearer {server.key}")
        connection.putheader("Content-Type", "application/json")
        connection.putheader("Content-Length", "1000")
        connection.endheaders(sent)
        connection.close()
    until(lambda: server.log.count("disconnected before its request was complete") == 2, 10)
    assert server.chat(model="phi-4").model == "phi-4"


def rejected(kind: type[openai.APIStatusError], status: int, ask: Any, *arguments: Any, **more: Any) -> Any:
    """Returns the error that the call raises; it must have this type, this status and a request id."""
    with pytest.raises(kind) as caught:
        ask(*arguments, **more)
    assert caught.value.status_code == status
    assert (caught.value.request_id or "").startswith("req_")
    assert set(caught.value.body) == {"message", "type", "param", "code"}  # type: ignore[call-overload]
    return caught.value


def test_errors_have_openai_types(server: Serving) -> None:
    error = rejected(openai.BadRequestError, 400, server.chat, n=3)
    assert (error.param, error.code) == ("n", "unsupported_parameter")
    error = rejected(openai.NotFoundError, 404, server.chat, model="gpt-9")
    assert (error.param, error.code) == ("model", "model_not_found")
    rejected(openai.UnprocessableEntityError, 422, server.chat, " ")
    rejected(openai.APIStatusError, 413, server.chat, "x" * 1_200_000)
    rejected(openai.APIStatusError, 405, server.client.get, "/chat/completions", cast_to=object)
    rejected(openai.NotFoundError, 404, server.client.embeddings.create, model="auto", input="x")


def test_a_model_at_capacity_reports_when_to_retry(server: Serving) -> None:
    error = rejected(openai.RateLimitError, 429, server.chat, model="gemma-2-27b")
    assert error.code == "rate_limit_exceeded"
    assert float(error.response.headers["retry-after"]) > 0
    assert float(error.response.headers["retry-after-ms"]) > 0
    # A stream that fails before it starts has an HTTP status as well.
    rejected(openai.RateLimitError, 429, server.chat, model="gemma-2-27b", stream=True)


def test_a_failed_named_model_is_502(server: Serving) -> None:
    server.fault("error", "phi-4")
    error = rejected(openai.InternalServerError, 502, server.chat, model="phi-4")
    assert "phi-4" in str(error)


def test_a_prompt_beyond_the_context_is_a_400_without_a_call(server: Serving) -> None:
    """Clients retry a 502, but not this."""
    count = "SELECT count(*) AS n FROM model_calls"
    before = server.rows(count)
    for model, tokens in (("phi-4", 17_000), ("auto", 200_000)):
        error = rejected(openai.BadRequestError, 400, server.chat, "word" * tokens, model=model)
        assert (error.code, error.type) == ("context_length_exceeded", "invalid_request_error")
        assert "maximum context length is" in str(error)
    assert server.rows(count) == before


@pytest.mark.parametrize("key", ["", "Bearer", "Bearer sk-router-wrong", "Basic abc", "bearer  "])
@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/auto", "/v1/chat/completions", "/docs", "/"])
def test_every_path_requires_a_key(server: Serving, path: str, key: str) -> None:
    method = requests.post if path.endswith("completions") else requests.get
    reply = method(f"{server.url}{path}", headers={"Authorization": key}, timeout=5)
    assert reply.status_code == 401
    assert reply.json()["error"]["type"] == "authentication_error"
    assert reply.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    "path", ["/docs", "/redoc", "/openapi.json", "/v1", "/v1/chat/completions/", "/v1/models/"]
)
def test_other_paths_are_404(server: Serving, path: str) -> None:
    reply = requests.get(f"{server.url}{path}", headers={"Authorization": f"Bearer {server.key}"}, timeout=5)
    assert reply.status_code == 404
    assert reply.json()["error"]["type"] == "invalid_request_error"


MESSAGES = [{"role": "user", "content": "Why?"}]


def test_invalid_bodies_are_reported(server: Serving) -> None:
    for body in (b"", b"{", b"[1]", b"\xff", b"[" * 100_000, b"null"):
        reply = server.post(data=body, headers={"Content-Type": "application/json"})
        assert reply.status_code == 400, body[:10]
        assert reply.json()["error"]["message"]
    assert server.post(data="{}", headers={"Content-Type": "text/plain"}).status_code == 415
    assert server.post(data="{}").status_code == 415


@pytest.mark.parametrize("prompt", ["", "\\n ", "a \\u0000 b", "a \\ud800 b"])
def test_an_unsendable_prompt_is_422(server: Serving, prompt: str) -> None:
    body = f'{{"model": "auto", "messages": [{{"role": "user", "content": "{prompt}"}}]}}'
    reply = server.post(data=body.encode(), headers={"Content-Type": "application/json"})
    assert (reply.status_code, reply.json()["error"]["param"]) == (422, "messages")


@pytest.mark.parametrize(
    "prompt", ["'; DROP TABLE tasks; --", "!!python/object:os.system x", "\u202e\x1b[2J", "%s"]
)
def test_prompts_are_stored_unchanged(server: Serving, prompt: str) -> None:
    completion = server.chat(prompt, model="phi-4")
    stored = server.rows("SELECT prompt FROM tasks WHERE id = %s", completion.router["task_id"])
    assert stored == [{"prompt": prompt}]


def test_a_chunked_body_is_limited(server: Serving) -> None:
    pieces = (b"x" * 65536 for _ in range(40))
    reply = server.post(data=pieces, headers={"Content-Type": "application/json"})
    assert (reply.status_code, reply.json()["error"]["code"]) == (413, "too_large")


async def test_requests_over_the_limit_get_503_with_retry_after(server: Serving) -> None:
    server.fault("hang")
    more = {"extra_body": {"router": {"deadline_seconds": 2}}}
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=server.key, max_retries=0) as client:
        requests_sent = [
            client.chat.completions.create(model="auto", messages=MESSAGES, **more)  # type: ignore[call-overload]
            for _ in range(24)
        ]
        answers = await asyncio.gather(*requests_sent, return_exceptions=True)
    errors = [answer for answer in answers if getattr(answer, "code", None) == "overloaded"]
    assert [error.status_code for error in errors] == [503] * 4
    assert {error.response.headers["retry-after"] for error in errors} == {"1"}


def test_keys_are_reloaded_at_runtime(server: Serving) -> None:
    def status(key: str) -> int:
        headers = {"Authorization": f"Bearer {key}"}
        return requests.get(f"{server.url}/v1/models", headers=headers, timeout=5).status_code

    key = add_key(server.keys_file, "guest")
    until(lambda: status(key) == 200, 5)
    remove_keys(server.keys_file, "guest")
    until(lambda: status(key) == 401, 5)
    assert status(server.key) == 200
    assert key not in server.log
    assert server.key not in server.log


def test_a_key_with_models_is_served_by_those_only(server: Serving) -> None:
    key = add_key(server.keys_file, "narrow", models=["phi-4"])
    headers = {"Authorization": f"Bearer {key}"}
    until(lambda: requests.get(f"{server.url}/v1/models", headers=headers, timeout=5).ok, 5)
    listed = [
        model["id"]
        for model in requests.get(f"{server.url}/v1/models", headers=headers, timeout=5).json()["data"]
    ]
    assert "phi-4" in listed
    assert "qwen-2.5-72b" not in listed
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0, timeout=30) as client:
        for model in ("auto", "auto:technical", "phi-4"):
            answer = client.chat.completions.create(model=model, messages=MESSAGES)
            assert answer.model == "phi-4"
        with pytest.raises(openai.NotFoundError, match="your API key may not use it") as refused:
            client.chat.completions.create(model="qwen-2.5-72b", messages=MESSAGES)
        assert refused.value.code == "model_not_found"
    called = server.rows(
        "SELECT DISTINCT model FROM model_calls WHERE client = 'narrow' AND role <> 'passages'"
    )
    assert called == [{"model": "phi-4"}]
    remove_keys(server.keys_file, "narrow")


def test_the_limit_of_a_key_bounds_its_client_over_all_models(server: Serving) -> None:
    key = add_key(server.keys_file, "limited", limit=TrafficTarget.parse("2/min, $5/day"))
    body = {"messages": MESSAGES, "router": {"deadline_seconds": 2}}

    def status(model: str) -> int:
        return server.post(key=key, json={"model": model, **body}).status_code

    until(lambda: server.post(key=key, json={}).status_code == 400, 5)
    until(lambda: status("phi-4") == 429, 20)
    assert status("qwen-2.5-72b") == 429
    assert server.chat(model="phi-4").model == "phi-4", "other clients are not limited"
    remove_keys(server.keys_file, "limited")


def test_an_expired_key_is_refused_by_that_word(server: Serving) -> None:
    key = add_key(server.keys_file, "past", expires=datetime.now(timezone.utc) - timedelta(seconds=1))
    url, headers = f"{server.url}/v1/models", {"Authorization": f"Bearer {key}"}
    until(lambda: "expired" in requests.get(url, headers=headers, timeout=5).text, 5)
    answer = requests.get(url, headers=headers, timeout=5)
    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "expired_api_key")
    remove_keys(server.keys_file, "past")


UNKNOWN_TOPIC = "Zxqv wrtp ghjklm?"


def test_rate_limited_models_report_when_to_retry(server: Serving) -> None:
    server.fault("rate_limit", retry_after_seconds=3)
    options = {"router": {"deadline_seconds": 1}}
    error = rejected(openai.InternalServerError, 504, server.chat, UNKNOWN_TOPIC, extra_body=options)
    assert error.code == "no_answer"
    error = rejected(openai.RateLimitError, 429, server.chat, UNKNOWN_TOPIC, extra_body=options)
    assert error.code == "rate_limit_exceeded"
    assert 0 < float(error.response.headers["retry-after-ms"]) <= 3000
    requests.delete(f"{server.backend.url}/faults", timeout=5)
    for model in ("qwen-2.5-72b", "phi-4"):  # available again within the default deadline
        assert server.chat(model=model).model == model


def test_sigterm_finishes_requests_within_the_grace(
    services: dict[str, str], backend: BackendServer, tmp_path: Path
) -> None:
    with serving(tmp_path, services, backend, "--no-keys", "--grace", "1") as server:
        server.fault("hang", "qwen-2.5-72b")

        def ask(model: str) -> requests.Response:
            body = {"model": model, "messages": MESSAGES}
            return requests.post(f"{server.url}/v1/chat/completions", json=body, timeout=20)

        with ThreadPoolExecutor() as threads:
            slow, quick = threads.submit(ask, "qwen-2.5-72b"), threads.submit(ask, "phi-4")
            in_progress = "SELECT FROM model_calls WHERE outcome IS NULL AND model = 'qwen-2.5-72b'"
            until(lambda: server.rows(in_progress), 10)
            server.process.send_signal(signal.SIGTERM)
            assert quick.result().status_code == 200
            assert (slow.result().status_code, slow.result().json()["error"]["code"]) == (503, "stopping")
        assert server.process.wait(10) == 0
    assert not server.rows("SELECT FROM model_calls WHERE outcome IS NULL")


@pytest.mark.parametrize(
    ("options", "environment", "words"),
    [
        ((), {}, "No client has an API key in"),
        (("--no-keys", "--host", "0.0.0.0"), {}, "--no-keys requires a loopback address"),
        ((), {"ROUTER_API_KEY": "hunter2"}, "ROUTER_API_KEY must have at least 20 characters"),
        (("--no-keys",), {}, "ROUTER_DATABASE_URL is not set"),
        (("--no-keys", "--host", "192.0.2.1"), {}, "--no-keys requires a loopback address"),
        (("--host", "192.0.2.1"), {"ROUTER_API_KEY": "x" * 20}, "Cannot listen on 192.0.2.1, port 8200"),
    ],
)
def test_invalid_serve_options_are_reported(
    tmp_path: Path, options: tuple[str, ...], environment: dict[str, str], words: str
) -> None:
    result = CommandLine({"ROUTER_API_KEYS": str(tmp_path / "none"), **environment})("serve", *options)
    assert result.code == 1
    assert result.err.startswith("router: ")
    assert words in result.err
    assert "hunter2" not in result.err


def test_config_errors_name_file_and_key(tmp_path: Path) -> None:
    router = CommandLine({"ROUTER_API_KEY": "x" * 20, "ROUTER_API_KEYS": str(tmp_path / "none"), **NOWHERE})
    for change, words in (
        ({"ranks": {"sport": 1}}, "models.phi-4.ranks.sport: no such category"),
        ({"endpint": "x"}, "models.phi-4.endpint: unknown key; did you mean `endpoint`?"),
    ):
        file = config_folder(tmp_path / words[:20]) / "models.yaml"
        config = yaml.safe_load(file.read_text())
        config["models"]["phi-4"].update(change)
        file.write_text(yaml.safe_dump(config))
        result = router("serve", "--port", "0", "--config", file.parent)
        assert result.code == 1
        assert f"{file}: " in result.err
        assert words in result.err


NOWHERE = {
    "ROUTER_DATABASE_URL": "postgresql://x@127.0.0.1:1/x",
    "ROUTER_REDIS_URL": "redis://127.0.0.1:1/0",
    "MODELS_BACKEND_URL": "http://127.0.0.1:1",
}


def test_keys_commands(tmp_path: Path) -> None:
    router = CommandLine({"ROUTER_API_KEYS": str(tmp_path / "folder" / "api_keys")})
    made = router("keys", "add", "alice")
    assert made.out.startswith("sk-router-")
    [key] = router("keys", "list", "--json").json
    assert (key["client"], key["expires"], key["last_used"], key["models"]) == ("alice", None, None, None)
    assert router("keys", "add", "alice").code == 1
    options = ("--limit", "60/min, 9k tokens/min", "--models", "phi-4, gemma-2-27b", "--expires", "90d")
    assert router("keys", "add", "alice", "--rotate", *options).code == 0
    second = router("keys", "list", "--json").json[1]
    assert (second["limit"], second["models"]) == ("60/min, 9k tokens/min", ["phi-4", "gemma-2-27b"])
    assert router("keys", "list").out.count("alice") == 2
    assert router("keys", "remove", "alice", "--id", key["id"]).out == "revoked the key of alice\n"
    for wrong in (("--limit", "60/mni"), ("--models", ","), ("--expires", "soon")):
        assert router("keys", "add", "carol", *wrong).code == 1
    assert router("keys", "remove", "alice").code == 0
    assert router("keys", "list").out.startswith("no client has a key")
    assert router("keys", "add", "bob", "--json").json["client"] == "bob"


WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {
    "type": "object", "required": ["city"], "properties": {"city": {"type": "string"}}}}}  # fmt: skip


def received(server: Serving, task_id: int) -> list[Any]:
    """Returns the requests that the backend got for this task, without those of fallback models."""
    calls = server.rows("SELECT call_id FROM model_calls WHERE task_id = %s AND role <> 'fallback'", task_id)
    ids = {str(call["call_id"]) for call in calls}
    rows = requests.get(f"{server.backend.url}/arrivals", params={"limit": 10_000}, timeout=10).json()
    return [row.get("request") for row in rows["arrivals"] if row["request_id"] in ids]


def test_a_request_reaches_the_backend_whole(server: Serving) -> None:
    given = {
        "messages": [{"role": "system", "content": "Be brief."}, *MESSAGES],
        "temperature": 0, "top_p": 0.9, "seed": 5, "stop": ["zzz"], "frequency_penalty": 0.5,
        "response_format": {"type": "json_object"}, "metadata": {"run": "7"}, "user": "u-1",
    }  # fmt: skip
    for model in ("phi-4", "auto"):
        completion = server.client.chat.completions.create(model=model, **given)  # type: ignore[call-overload]
        assert isinstance(json.loads(completion.choices[0].message.content), dict)
        assert received(server, completion.router["task_id"]) == [given]
    stored = server.rows("SELECT request FROM tasks WHERE id = %s", completion.router["task_id"])
    assert stored == [{"request": given}]


def test_calls_of_tools_come_back_whole_and_as_a_stream(server: Serving) -> None:
    choice = server.chat("What is the weather?", model="phi-4", tools=[WEATHER]).choices[0]
    (call,) = choice.message.tool_calls
    assert (choice.finish_reason, choice.message.content, call.function.name) == (
        "tool_calls",
        None,
        "weather",
    )
    assert set(json.loads(call.function.arguments)) == {"city"}
    chunks = list(server.chat("What is the weather?", model="phi-4", tools=[WEATHER], stream=True))
    deltas = [delta for chunk in chunks for delta in chunk.choices[0].delta.tool_calls or ()]
    assert [(delta.index, delta.function.arguments) for delta in deltas] == [(0, call.function.arguments)]
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    turns = [
        {"role": "user", "content": "What is the weather?"},
        {"role": "assistant", "content": None, "tool_calls": [call.model_dump()]},
        {"role": "tool", "tool_call_id": call.id, "content": "12 C"},
    ]
    answer = server.client.chat.completions.create(model="phi-4", messages=turns, tools=[WEATHER])  # type: ignore[call-overload]
    assert (answer.choices[0].finish_reason, answer.choices[0].message.tool_calls) == ("stop", None)


@pytest.mark.parametrize(
    ("param", "more"),
    [
        ("messages.[0].content.[0]", {"messages": [{"role": "user", "content": [
            {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}]}]}),
        ("n", {"n": 2}),
        ("logprobs", {"logprobs": True}),
    ],
)  # fmt: skip
def test_what_the_backend_cannot_do_is_refused_by_name(
    server: Serving, param: str, more: dict[str, Any]
) -> None:
    reply = server.post(json={"model": "auto", "messages": MESSAGES, **more})
    error = reply.json()["error"]
    assert (reply.status_code, error["param"], error["code"]) == (400, param, "unsupported_parameter")
