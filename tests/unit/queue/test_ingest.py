"""Prompt files: parsing of each format, validation of rows, and reported errors."""

from __future__ import annotations

import gzip
import io
import json
import tracemalloc
from collections.abc import Iterator
from datetime import datetime, timezone
from typing import Any

import pytest
from hypothesis import given, settings, strategies

from router.queue import prompt_files
from router.queue.ingest import IngestDefaults, InvalidRow, NewTask, read_tasks
from router.queue.prompt_files import Format, decompressed, detect_format
from router.request import ModelRequest, RequestError


def stream(data: bytes | str) -> io.BufferedReader:
    raw = io.BytesIO(data.encode() if isinstance(data, str) else data)
    return io.BufferedReader(raw)  # type: ignore[type-var]


def read(data: bytes | str, kind: Format = Format.JSONL, **rules: Any) -> list[NewTask | InvalidRow]:
    return list(read_tasks(stream(data), kind, IngestDefaults(**rules)))


def tasks(data: bytes | str, kind: Format = Format.JSONL, **rules: Any) -> list[NewTask]:
    found = read(data, kind, **rules)
    assert all(isinstance(item, NewTask) for item in found), found
    return [item for item in found if isinstance(item, NewTask)]


def problem(data: bytes | str, kind: Format = Format.JSONL, **rules: Any) -> str:
    found = read(data, kind, **rules)
    assert len(found) == 1, found
    assert isinstance(found[0], InvalidRow), found
    return found[0].problem


def test_a_jsonl_row_sets_every_field():
    line = {
        "prompt": "Why?", "category": "Technical", "priority": 3, "id": 17, "max_tokens": 40,
        "deadline_at": "2026-01-31T12:00:00Z",
    }  # fmt: skip
    (task,) = tasks(json.dumps(line))
    deadline = datetime(2026, 1, 31, 12, tzinfo=timezone.utc)
    assert task == NewTask(1, "Why?", "17", own_id=True, category="technical", priority=3, max_tokens=40,
                           deadline_at=deadline)  # fmt: skip


def test_a_deadline_is_converted_to_utc():
    row = '{"prompt": "a", "deadline_at": "2026-01-31T12:00:00+20:00"}'
    (task,) = tasks(row)
    assert task.deadline_at is not None
    assert task.deadline_at.isoformat() == "2026-01-30T16:00:00+00:00"


def test_an_openai_batch_line_sets_prompt_id_and_max_tokens():
    body = {"model": "x", "messages": [{"role": "user", "content": "Hi"}], "max_completion_tokens": 9}
    line = {"custom_id": "r-1", "method": "POST", "url": "/v1/chat/completions", "body": body}
    (task,) = tasks(json.dumps(line), Format.OPENAI)
    assert (task.external_id, task.prompt, task.max_tokens) == ("r-1", "Hi", 9)
    assert task.request is not None
    assert json.loads(task.request) == {"model": "x", "messages": body["messages"], "max_tokens": 9}


REQUESTS = {
    "temperature": 0.5,
    "response_format": {"type": "json_object"},
    "tools": [{"type": "function", "function": {"name": "weather"}}],
    "model": "phi-4",
    "seed": 3,
}


@pytest.mark.parametrize("name", REQUESTS)
@pytest.mark.parametrize("kind", ["body", "messages", "prompt"])
def test_parameters_of_a_line_are_kept(name: str, kind: str):
    content = {"prompt": "Hi"} if kind == "prompt" else {"messages": [{"role": "user", "content": "Hi"}]}
    given = {**content, name: REQUESTS[name]}
    (task,) = tasks(json.dumps({"id": "1", "body": given} if kind == "body" else {"id": "1", **given}))
    assert task.request is not None
    assert json.loads(task.request) == {k: v for k, v in given.items() if k != "prompt"}
    assert task.prompt == "Hi"


def test_a_line_that_is_only_a_prompt_keeps_no_request():
    chat = '{"messages":[{"role":"user","content":"b"}],"max_tokens":5,"model":"auto"}'
    first, second = tasks(f'{{"prompt":"a","source":"x"}}\n{chat}')
    assert (first.request, second.request, second.max_tokens) == (None, None, 5)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"prompt":"a","temperature":"hot"}', "temperature is invalid"),
        ('{"prompt":"a","n":2}', "n does not support this value"),
        ('{"body":{"prompt":"a","colour":"red"}}', "colour"),
        ('{"body":{"messages":[{"role":"user","content":"a"}],"tools":[{}]}}', "tools.0.type"),
    ],
)
def test_invalid_and_unsupported_parameters_of_a_line_are_named(line: str, words: str):
    assert words in problem(line)


def test_the_model_of_all_rows_takes_the_place_of_that_of_a_line():
    line = '{"prompt":"a","model":"gone"}'
    assert tasks(line, model="auto")[0].request is None
    assert tasks(line, model="phi-4")[0].request == '{"model": "phi-4"}'


def test_rows_without_an_id_differ_by_their_request():
    first, second, again = tasks('{"prompt":"a","seed":1}\n{"prompt":"a","seed":2}\n{"seed":1,"prompt":"a"}')
    assert len({first.external_id, second.external_id, again.external_id}) == 3
    assert again.external_id.rpartition(":")[0] == first.external_id.rpartition(":")[0]


def test_a_request_that_the_check_refuses_is_an_invalid_row():
    def refuse(request: ModelRequest) -> None:
        raise RequestError(f"{request.pin} is not in use", "model")

    assert "phi-4 is not in use" in problem('{"prompt":"a","model":"phi-4"}', check=refuse)


def test_defaults_apply_to_fields_that_a_row_does_not_set():
    first, second = tasks('{"prompt":"a"}\n{"prompt":"b","category":"creative","priority":-2}\n',
                          category="technical", priority=4)  # fmt: skip
    assert (first.category, first.priority) == ("technical", 4)
    assert (second.category, second.priority) == ("creative", -2)


def test_a_csv_row_is_numbered_by_its_first_line():
    text = 'id,Prompt,category\n1,"two\nlines, and ""quotes""",general\n2,short\n\n3,a,b,c,d\n'
    first, second, third = read(text, Format.CSV)
    assert isinstance(first, NewTask)
    assert (first.line, first.prompt, first.external_id) == (2, 'two\nlines, and "quotes"', "1")
    assert isinstance(second, NewTask)
    assert (second.line, second.category) == (4, None)
    assert isinstance(third, InvalidRow)
    assert (third.line, "quote text that contains commas" in third.problem) == (6, True)


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_the_csv_delimiter_is_detected(delimiter: str):
    (task,) = tasks(f"prompt{delimiter}category\nhello{delimiter}general\n", Format.CSV)
    assert (task.prompt, task.category) == ("hello", "general")


def test_an_unclosed_csv_quote_is_reported_after_the_rows_before_it():
    first, second = read('prompt\ngood\n"never closed\nmore\n', Format.CSV)
    assert isinstance(first, NewTask)
    assert isinstance(second, InvalidRow)
    assert second.line == 3


def test_text_is_one_prompt_per_line_without_blank_lines():
    assert [(task.line, task.prompt) for task in tasks("\ufeffone\r\n\n  \n two \n", Format.TEXT)] == [
        (1, "one"),
        (4, " two "),
    ]


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("nonsense", "not valid JSON"),
        ("[1, 2]", "one object per line"),
        ('"text"', "not a JSON object"),
        ("[" * 100_000, "cannot be parsed"),
        ('{"prompt": 5}', "prompt is '5': Input should be a valid string"),
        ('{"question": "?"}', "no prompt"),
        ('{"prompt": " \\n"}', "empty"),
        ('{"prompt": "a\\u0000b"}', "NUL"),
        ('{"prompt": "half \\ud83d"}', "UTF-8"),
        ('{"prompt": "a", "priority": 10}', "priority is '10'"),
        ('{"prompt": "a", "priority": true}', "priority"),
        ('{"prompt": "a", "max_tokens": 0}', "max_tokens"),
        ('{"prompt": "a", "max_tokens": 1.5}', "max_tokens"),
        ('{"prompt": "a", "deadline_at": "2026-01-31T12:00:00"}', "offset"),
        ('{"prompt": "a", "deadline_at": "soon"}', "deadline_at"),
        ('{"prompt": "a", "deadline_at": "0001-01-01T00:00:00+20:00"}', "deadline_at"),
        ('{"prompt": "a", "id": [1]}', "id is '[1]'"),
        ('{"prompt": "a", "id": "%s"}' % ("x" * 501), "at most 500 characters"),
        ('{"prompt": "a", "category": 3}', "category"),
        ('{"custom_id": "a", "body": {"messages": []}}', "at least one message"),
        ('{"custom_id": "a", "body": 7}', "body"),
        ('{"custom_id": "a", "url": "/v1/embeddings", "body": {"input": "x"}}', "/v1/embeddings"),
    ],
)
def test_the_error_of_an_invalid_row_is_reported(line: str, word: str):
    assert word in problem(line)


def test_openai_format_requires_custom_id():
    assert "custom_id" in problem('{"prompt": "a"}', Format.OPENAI)


@pytest.mark.parametrize("kind", [Format.JSONL, Format.TEXT, Format.CSV])
def test_invalid_bytes_affect_only_their_row(kind: Format):
    rows = [b"prompt"] if kind is Format.CSV else []
    rows += [b'{"prompt":"caf\xff"}', b'{"prompt":"n\x00l"}', b'{"prompt":"caf\xc3\xa9"}']
    if kind is Format.CSV:
        rows = [row.replace(b'"', b"'") for row in rows]
    *bad, good = read(b"\n".join(rows), kind)
    assert ["UTF-8" in bad[0].problem, "NUL" in bad[1].problem] == [True, True]  # type: ignore[union-attr]
    assert isinstance(good, NewTask)
    assert "café" in good.prompt


def test_an_overlong_line_is_skipped_in_bounded_memory(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(prompt_files, "MAX_LINE_BYTES", 100_000)
    data = stream(b'{"prompt":"' + b"x" * 20_000_000 + b'"}\n{"prompt":"after"}\n')
    tracemalloc.start()
    try:
        first, second = read_tasks(data, Format.JSONL, IngestDefaults())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert isinstance(first, InvalidRow)
    assert "longer than" in first.problem
    assert isinstance(second, NewTask)
    assert peak < 2_000_000


def test_prompt_length_is_limited_in_bytes():
    assert "12 bytes" in problem('{"prompt":"éééééé"}', max_prompt_bytes=11)


def test_the_id_of_a_prompt_does_not_depend_on_the_format():
    (plain,) = tasks('{"prompt":"Why?"}')
    (text,) = tasks("Why?\n", Format.TEXT)
    assert plain.external_id == text.external_id
    assert not plain.own_id


def test_repeated_prompts_get_distinct_reproducible_ids():
    once = [task.external_id for task in tasks("a\nb\na\n", Format.TEXT)]
    assert len(set(once)) == 3
    assert once == [task.external_id for task in tasks("a\nb\na\n", Format.TEXT)]


def test_the_id_prefix_applies_to_own_ids_only():
    own, made = tasks('{"prompt":"a","id":"1"}\n{"prompt":"a"}\n', id_prefix="b2/")
    assert own.external_id == "b2/1"
    assert made.external_id.startswith("prompt:")


def test_the_first_id_field_that_is_not_empty_is_used():
    first, second = tasks('{"prompt":"a","custom_id":"","external_id":null,"id":7}\n'
                          '{"prompt":"a","id":[1],"custom_id":"c"}')  # fmt: skip
    assert (first.external_id, second.external_id) == ("7", "c")


@pytest.mark.parametrize(
    ("name", "data", "kind"),
    [
        ("a.jsonl", "", Format.JSONL),
        ("a.JSONL.gz", "", Format.JSONL),
        ("a.csv", "", Format.CSV),
        ("a.txt", '{"a": 1}', Format.TEXT),
        ("standard input", '{"prompt": "x"}\n', Format.JSONL),
        ("standard input", "id;prompt\n1;x\n", Format.CSV),
        ("standard input", "tell me about prompt, and more\n", Format.TEXT),
        ("standard input", "", Format.TEXT),
    ],
)
def test_the_format_is_detected_by_suffix_or_first_line(name: str, data: str, kind: Format):
    source = stream(data)
    assert detect_format(name, source) is kind
    assert source.read() == data.encode()  # detection consumed nothing


def test_truncated_gzip_is_reported_after_its_readable_rows():
    whole = gzip.compress(b'{"prompt":"a"}\n' * 3)
    assert len(list(read_tasks(decompressed(stream(whole)), Format.JSONL, IngestDefaults()))) == 3
    *_, last = read_tasks(decompressed(stream(whole[:-9])), Format.JSONL, IngestDefaults())
    assert isinstance(last, InvalidRow)
    assert "from here on" in last.problem


def test_utf16_is_reported_once():
    assert "UTF-16" in problem("prompt\nhello\n".encode("utf-16"), Format.TEXT)


def test_a_csv_file_without_a_prompt_column_is_reported():
    assert "only question, answer" in problem("question,answer\na,b\n", Format.CSV)


def pieces() -> Iterator[bytes]:
    yield from (
        b'{"prompt":"a"}',
        b"{",
        b'"',
        b",",
        b"\n",
        b"\r",
        b"\x00",
        b"\xff",
        b"\xef\xbb\xbf",
        b"prompt",
    )
    yield from (b"\x1f\x8b", b"\\ud800", b'"""', b"[" * 50, b"1e999", b'{"body":{"messages":[{}]}}')


@settings(max_examples=150, deadline=None)
@given(strategies.lists(strategies.sampled_from(list(pieces())) | strategies.binary(max_size=8), max_size=12),
       strategies.sampled_from(list(Format)))  # fmt: skip
def test_reading_arbitrary_bytes_never_raises(parts: list[bytes], kind: Format):
    for item in read_tasks(decompressed(stream(b"".join(parts))), kind, IngestDefaults()):
        assert isinstance(item, (NewTask, InvalidRow))
        if isinstance(item, NewTask):
            item.prompt.encode()  # Postgres can store it
            assert "\0" not in item.prompt + item.external_id + (item.category or "")


def test_the_same_prompt_of_two_clients_is_two_tasks() -> None:
    made = {tasks("a", Format.TEXT, client=client)[0].external_id for client in ("", "alice", "bob")}
    assert len(made) == 3
