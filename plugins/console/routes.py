"""The routes of the API. Reads answer what `router ... --json` prints, in the same words."""

from __future__ import annotations

import asyncio
import re
import uuid
from typing import Annotated, Any

from fastapi import APIRouter, HTTPException, Query, Request
from fastapi.responses import Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from router.traffic import GRAMMAR, LONGEST_LINE_CHARACTERS, TrafficTarget

from . import airflow_links, auth, tasks
from .ask import Asked
from .live import as_line
from .state import ConsoleState

MOST_BYTES = 4_096
MOST_ASK_BYTES = 4_200_000  # a prompt of a million characters, in UTF-8 or escaped
MODEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
EVENTS = "text/event-stream"  # of all types the one that nothing on the way collects or compresses
STREAM_HEADERS = {"x-accel-buffering": "no"}
LONGEST_NAME = 100

api = APIRouter()
Name = Annotated[str | None, Query(max_length=LONGEST_NAME)]


class NewTarget(BaseModel):
    """A target as people write it."""

    model_config = ConfigDict(extra="forbid")

    target: str = Field(min_length=1, max_length=LONGEST_LINE_CHARACTERS)


class Retry(BaseModel):
    """Which failed tasks: some by number, or all of a category, or all."""

    model_config = ConfigDict(extra="forbid")

    task_ids: list[int] | None = Field(default=None, max_length=1000)
    category: str | None = Field(default=None, max_length=LONGEST_NAME)


def _console(request: Request) -> ConsoleState:
    console: ConsoleState = request.app.state.console
    return console


def _json(value: Any) -> Response:
    return _line(as_line(value))


def _line(line: bytes) -> Response:
    return Response(line, media_type="application/json")


@api.get("")
async def index(request: Request, _user: auth.Reader) -> Response:
    """All routes of the console, with what each is for."""
    found = [
        {"path": route.path, "methods": sorted(route.methods), "about": route.description}
        for route in request.app.routes
    ]
    return _json({"routes": found})


@api.get("/me")
async def me(user: auth.Reader) -> Response:
    """Who is there, what they may do, and the grammar of targets."""
    rights = await asyncio.to_thread(
        lambda: {
            "traffic": auth.may_edit(user, "any"),
            "ask": auth.may_trigger(user, auth.ASK_DAG),
            "retry": auth.may_trigger(user, auth.SOLVE_DAG),
        }
    )
    return _json({"user": user.get_name(), "may": rights, "grammar": GRAMMAR})


@api.get("/status")
async def status(request: Request, _user: auth.Reader) -> Response:
    """The board once: `router status --json`, and pace, oldest task, sends and Variables."""
    return Response(await _console(request).live.newest(), media_type="application/json")


@api.get("/live")
async def live(request: Request, _user: auth.Reader) -> StreamingResponse:
    """The board each second, one JSON line each, for some seconds; then ask again."""
    return StreamingResponse(_console(request).live.stream(), media_type=EVENTS, headers=STREAM_HEADERS)


@api.get("/history")
async def history(request: Request, _user: auth.Reader) -> Response:
    """Calls and targets of the last minutes, for the plots."""
    return _json(await _console(request).reads.run(_console(request).history.read))


@api.put("/traffic/{model}")
async def set_target(model: str, request: Request, user: auth.Editor) -> Response:
    """Set the Airflow Variable of the model; it holds within a second."""
    if not MODEL.fullmatch(model):
        raise HTTPException(404, "There is no such model.")
    body = await auth.read_body(request, NewTarget, MOST_BYTES)
    target = TrafficTarget.parse(body.target)
    console = _console(request)
    await console.reads.run(lambda connection: tasks.require_model(connection, model))
    await asyncio.to_thread(console.variables.set, model, body.target.strip(), user.get_name())
    return _json({"model": model, "target": str(target), "warnings": target.warnings})


class Wanted(BaseModel):
    """Which calls. `outcome` may also be `wrong` or `under way`; `before` is a call_id."""

    model: str | None = Field(default=None, max_length=LONGEST_NAME)
    category: str | None = Field(default=None, max_length=LONGEST_NAME)
    outcome: str | None = Field(default=None, max_length=LONGEST_NAME)
    before: uuid.UUID | None = None
    limit: int = Field(default=50, ge=1, le=200)


@api.get("/calls")
async def calls(request: Request, _user: auth.Reader, asked: Annotated[Wanted, Query()]) -> Response:
    """The newest calls that fit, in the words of `router log --json`."""
    before = None if asked.before is None else str(asked.before)
    wanted = tasks.Wanted(
        asked.model or None, asked.category or None, asked.outcome or None, before, asked.limit
    )
    return _json(await _console(request).reads.run(lambda connection: tasks.calls(connection, wanted)))


@api.get("/tasks/{task_id}")
async def task(task_id: int, request: Request, _user: auth.Reader) -> Response:
    """One task's whole story: the task, its place in the queue, and all its calls."""
    story = await _console(request).reads.run(lambda connection: tasks.story(connection, task_id))
    if story is None:
        raise HTTPException(404, f"There is no task {task_id}.")
    logs = await asyncio.to_thread(airflow_links.logs, story["calls"], story.pop("runs"))
    return _json({**story, "logs": logs})


@api.get("/failures")
async def failures(
    request: Request, _user: auth.Reader, category: Name = None, before: Name = None,
    limit: Annotated[int, Query(ge=1, le=200)] = 20,
) -> Response:  # fmt: skip
    """The tasks that failed last, with their reasons. `before`: a `failed_at`."""
    reads = _console(request).reads
    return _json(await reads.run(lambda c: tasks.failures(c, category or None, before, limit)))


@api.post("/failures/retry")
async def retry(request: Request, _user: auth.Retrier) -> Response:
    """Set failed tasks back to unsolved, at most 10,000 a time; `router retry`."""
    body = await auth.read_body(request, Retry, 4 * MOST_BYTES)
    return _json(await _console(request).retry(body.category, body.task_ids))


@api.get("/priorities")
async def priorities(request: Request, _user: auth.Reader) -> Response:
    """For each category the models in order, with the evidence for it."""
    return _line(await _console(request).priorities.line())


@api.get("/search")
async def search(request: Request, _user: auth.Reader) -> Response:
    """What the last search found, tried and took on, and what the models on probation need."""
    return _line(await _console(request).search.line())


@api.post("/ask")
async def ask(request: Request, _user: auth.Asking) -> StreamingResponse:
    """Answer a prompt, and tell what happens as it happens, one JSON line each."""
    body = await auth.read_body(request, Asked, MOST_ASK_BYTES)
    lines = await _console(request).asks.stream(body)
    return StreamingResponse(lines, media_type=EVENTS, headers=STREAM_HEADERS)
