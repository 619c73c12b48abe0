"""Exports finished tasks in the output format of OpenAI's Batch API."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from router.errors import InputError, printable_json
from router.files import replacing
from router.task import TaskStatus


def output_line(task: Mapping[str, Any]) -> str:
    """Returns one line of an OpenAI Batch output file: a chat completion, or an error for a failed task."""
    name = task["external_id"] or str(task["id"])
    line: dict[str, Any] = {"id": f"task-{task['id']}", "custom_id": name, "response": None, "error": None}
    if task["status"] == TaskStatus.FAILED.value:
        line["error"] = {"code": "failed", "message": task["failure"] or "the task failed"}
    else:
        call = str(task["answer_call_id"] or line["id"])
        line["response"] = {"status_code": 200, "request_id": call, "body": _completion(task, call)}
    return printable_json(line) + "\n"


def _completion(task: Mapping[str, Any], call: str) -> dict[str, Any]:
    message = {"role": "assistant", "content": task["answer"] or ""}
    body: dict[str, Any] = {
        "id": f"chatcmpl-{call}",
        "object": "chat.completion",
        "created": int(task["finished_at"].timestamp()) if task["finished_at"] else 0,
        "model": task["answered_by"] or "unknown",
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
    }
    prompt, completion = task["prompt_tokens"], task["completion_tokens"]
    if prompt is not None or completion is not None:  # old calls are dropped from the log
        counts = {"prompt_tokens": prompt or 0, "completion_tokens": completion or 0}
        body["usage"] = {**counts, "total_tokens": sum(counts.values())}
    return body


def write_lines(path: Path | None, lines: Iterable[str]) -> int:
    """Writes the lines to `path`, or to standard output if it is None. Returns how many.

    A file is created or replaced only once all lines are written. Raises InputError if that fails.
    """
    written = 0
    with _opened(path) as file:
        for line in lines:
            file.write(line)
            written += 1
    return written


@contextmanager
def _opened(path: Path | None) -> Iterator[IO[str]]:
    if path is None:
        yield sys.stdout
        sys.stdout.flush()
        return
    path = Path(os.path.realpath(path))  # a symbolic link keeps its target
    if path.is_dir():
        raise InputError(f"{path} is a folder; name a file in it.")
    try:
        with path.open("w", encoding="utf-8") if _is_special(path) else _replacing(path) as file:
            yield file
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror or error}.") from error


def _is_special(path: Path) -> bool:
    return path.exists() and not path.is_file()  # a pipe or a device cannot be replaced


@contextmanager
def _replacing(path: Path) -> Iterator[IO[str]]:
    with replacing(path, mode=None if path.exists() else _default_mode()) as file:
        text = io.TextIOWrapper(file, encoding="utf-8")
        yield text
        text.detach()


def _default_mode() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask
