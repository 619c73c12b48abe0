"""Routes of the API. Reads return what `router ... --json` prints, with the same keys."""

from __future__ import annotations

import asyncio
import json
import re
import uuid
from datetime import datetime
from typing import Annotated, Any

from fastapi import APIRouter, HTTPException, Query, Request
from fastapi.responses import Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from router.errors import ConfigError, InputError, RouterError
from router.task import client_of_user
from router.traffic import GRAMMAR, MAX_LINE_CHARACTERS, TrafficTarget

from . import airflow_links, audit, auth, pause_dag, tasks
from .ask import AskBody
from .live import as_line
from .searches import SearchBody, UndoBody
from .state import ConsoleState, addresses

MAX_BYTES = 4_096
MAX_ASK_BYTES = 4_200_000  # a prompt of a million characters, in UTF-8 or escaped
MODEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
TEXTS = frozenset({"prompt", "answer", "failure", "error", "last_error"})
EVENTS = "text/event-stream"  # the type that proxies neither buffer nor compress
STREAM_HEADERS = {"x-accel-buffering": "no"}
MAX_NAME_CHARACTERS = 100
PAUSED = {True: "paused", False: "running"}

api = APIRouter(route_class=audit.AuditedRoute)
# Postgres cannot store NUL characters.
Text = Annotated[str, StringConstraints(max_length=MAX_NAME_CHARACTERS, pattern=r"^[^\x00]*$")]
Id = Annotated[int, Field(gt=-(2**63), lt=2**63)]


class TargetBody(BaseModel):
    """Body that sets a traffic target."""

    model_config = ConfigDict(extra="forbid")

    target: str = Field(min_length=1, max_length=MAX_LINE_CHARACTERS)


class RetryBody(BaseModel):
    """Body that selects failed tasks: by id, by category, or all."""

    model_config = ConfigDict(extra="forbid")

    task_ids: list[Id] | None = Field(default=None, max_length=1000)
    category: Text | None = None


class PauseBody(BaseModel):
    """Body that pauses or resumes the batch."""

    model_config = ConfigDict(extra="forbid")

    paused: bool


def _console(request: Request) -> ConsoleState:
    console: ConsoleState = request.app.state.console
    return console


def _database_url() -> str:
    return addresses().database_url


def _json(value: Any) -> Response:
    return _line(as_line(value))


def _line_for(line: bytes, *, texts: bool) -> bytes:
    if texts:
        return line
    # An `error` of the whole is a message of the console.
    return as_line({key: without_texts(value) for key, value in json.loads(line).items()})


def without_texts(value: Any) -> Any:
    """Returns a JSON value without prompts, answers and error texts: ids, states and counts remain."""
    if isinstance(value, dict):
        return {key: None if key in TEXTS else without_texts(inner) for key, inner in value.items()}
    return [without_texts(inner) for inner in value] if isinstance(value, list) else value


def _line(line: bytes) -> Response:
    return Response(line, media_type="application/json")


@api.get("")
async def index(request: Request, _user: auth.Reader) -> Response:
    """All routes of the console with their descriptions."""
    found = [
        {"path": route.path, "methods": sorted(route.methods), "about": route.description}
        for route in request.app.routes
    ]
    return _json({"routes": found})


@api.get("/me")
async def me(user: auth.Reader, texts: auth.MayReadTexts) -> Response:
    """The user, their permissions, and the grammar of targets."""
    rights = await asyncio.to_thread(
        lambda: {
            "traffic": auth.may_edit(user, "any"),
            "ask": auth.may_trigger(user, auth.ASK_DAG),
            "retry": auth.may_trigger(user, auth.SOLVE_DAG),
            "pause": auth.may_pause(user),
            "search": auth.may_trigger(user, auth.REVIEW_DAG),
        }
    )
    return _json({"user": user.get_name(), "may": rights, "texts": texts, "grammar": GRAMMAR})


@api.get("/status")
async def status(request: Request, _user: auth.Reader, texts: auth.MayReadTexts) -> Response:
    """The status once: `router status --json` with throughput, oldest task, sends and Variables."""
    return _line(_line_for(await _console(request).live.newest(), texts=texts))


@api.get("/live")
async def live(request: Request, _user: auth.Reader, texts: auth.MayReadTexts) -> StreamingResponse:
    """The status every second as JSON lines. The stream ends after some seconds; then connect again."""
    newest = _console(request).live.stream()
    lines = (_line_for(line, texts=texts) async for line in newest)
    return StreamingResponse(lines, media_type=EVENTS, headers=STREAM_HEADERS)


@api.get("/history")
async def history(request: Request, _user: auth.Reader) -> Response:
    """Calls and targets of the last ten minutes, for the plots."""
    return _json(await _console(request).reads.run(_console(request).history.read))


@api.put("/traffic/{model}")
async def set_target(model: str, request: Request, user: auth.Editor) -> Response:
    """Set the Airflow Variable of a model; the target applies within a second."""
    if not MODEL.fullmatch(model):
        raise HTTPException(404, f"There is no model {model[:80]!r}. The Models tab lists the names.")
    body = await auth.read_body(request, TargetBody, MAX_BYTES)
    target = TrafficTarget.parse(body.target)
    console = _console(request)
    await console.reads.run(lambda connection: tasks.require_model(connection, model))
    source = await console.reads.run(lambda connection: tasks.target_source(connection, model))
    if source is not None:
        place, _, _ = source.partition(";")
        raise HTTPException(409, f"The target of {model} comes from the {place}. Change it there.")
    before = await asyncio.to_thread(console.variables.set, model, body.target.strip(), user.get_name())
    audit.describe(request, model, before=before, after=str(target))
    await audit.store(_database_url, "traffic", model, before=before, after=str(target))
    return _json({"model": model, "target": str(target), "warnings": target.warnings})


class CallQuery(BaseModel):
    """Selects calls. `outcome` may also be `wrong` or `under way`; `before` is a call_id."""

    model: Text | None = None
    category: Text | None = None
    outcome: Text | None = None
    client: Text | None = None
    before: uuid.UUID | None = None
    limit: int = Field(default=50, ge=1, le=200)


@api.get("/calls")
async def calls(
    request: Request, _user: auth.Reader, texts: auth.MayReadTexts, query: Annotated[CallQuery, Query()]
) -> Response:  # fmt: skip
    """The newest matching calls, with the keys of `router log --json`."""
    before = None if query.before is None else str(query.before)
    filters = tasks.CallFilter(
        query.model or None, query.category or None, query.outcome or None, before, query.limit, query.client
    )
    found = await _console(request).reads.run(lambda connection: tasks.calls(connection, filters))
    return _line(_line_for(as_line(found), texts=texts))


@api.put("/paused")
async def pause(request: Request, user: auth.Pausing) -> Response:
    """Pause or resume the DAG solve_tasks; calls in flight finish."""
    body = await auth.read_body(request, PauseBody, MAX_BYTES)
    await asyncio.to_thread(pause_dag.set_paused, auth.SOLVE_DAG, user.get_name(), paused=body.paused)
    words = {"before": PAUSED[not body.paused], "after": PAUSED[body.paused]}
    audit.describe(request, auth.SOLVE_DAG, **words)
    await audit.store(_database_url, "pause", auth.SOLVE_DAG, **words)
    return _json({"paused": body.paused})


@api.get("/spend")
async def spend(request: Request, _user: auth.Reader) -> Response:
    """Calls, tokens and cost of each model in the last hour and the last 24 hours."""
    return _line(await _console(request).spend.line())


@api.get("/clients")
async def clients(request: Request, _user: auth.Reader) -> Response:
    """Usage, cost, limits and share of the queue of each client; see `router clients`."""
    return _line(await _console(request).clients.line())


@api.get("/tasks")
async def find_tasks(request: Request, _user: auth.Reader, text: Annotated[Text, Query()]) -> Response:
    """The tasks whose id or external id is `text`: at most two."""
    return _json(await _console(request).reads.run(lambda connection: tasks.find(connection, text)))


@api.get("/tasks/{task_id}")
async def task(
    task_id: int, request: Request, _user: auth.Reader, texts: auth.MayReadTexts
) -> Response:  # fmt: skip
    """One task, its state in the queue, and all its calls; texts as in /me."""
    details = await _console(request).reads.run(lambda connection: tasks.task_details(connection, task_id))
    if details is None:
        raise HTTPException(404, f"There is no task {task_id}.")
    logs = await asyncio.to_thread(airflow_links.logs, details["calls"], details.pop("runs"))
    return _line(_line_for(as_line({**details, "logs": logs}), texts=texts))


class FailureQuery(BaseModel):
    """Selects failed tasks. `before`: a `failed_at`."""

    category: Text | None = None
    client: Text | None = None
    before: datetime | None = None
    limit: int = Field(default=20, ge=1, le=200)


@api.get("/failures")
async def failures(
    request: Request, _user: auth.Reader, texts: auth.MayReadTexts, query: Annotated[FailureQuery, Query()]
) -> Response:  # fmt: skip
    """The newest failed tasks with their reasons."""
    values = (query.category or None, query.before, query.limit, query.client)
    found = await _console(request).reads.run(lambda connection: tasks.failures(connection, *values))
    return _line(_line_for(as_line(found), texts=texts))


@api.post("/failures/retry")
async def retry(request: Request, _user: auth.Retrier) -> Response:
    """Requeue failed tasks, at most 10,000 per request; see `router retry`."""
    body = await auth.read_body(request, RetryBody, 4 * MAX_BYTES)
    done = await _console(request).retry(body.category, body.task_ids)
    chosen = body.category or "all failed tasks" if body.task_ids is None else f"{len(body.task_ids)} tasks"
    audit.describe(request, chosen, after=f"{done.unsolved} requeued")
    return _json(done)


@api.get("/priorities")
async def ranking(request: Request, _user: auth.Reader) -> Response:
    """The ranking of each category with its evidence."""
    return _line(await _console(request).ranking.line())


@api.get("/search")
async def discovery(request: Request, _user: auth.Reader) -> Response:
    """Candidates of the last search, models on probation, and changes of the roster."""
    return _line(await _console(request).discovery.line())


@api.post("/ask/open")
async def open_router(request: Request, _user: auth.Asking) -> Response:
    """Prepare for asking: connections, classifier and knowledge. Returns at once."""
    return _json({"ready": _console(request).asks.warm_up()})


@api.get("/search/progress")
async def search_progress(request: Request, _user: auth.Reader) -> Response:
    """The search that runs now with the calls of its trials, or null."""
    return _line(await _console(request).search_progress.line())


@api.post("/search")
async def start_search(request: Request, user: auth.Searcher) -> Response:
    """Search for better models now; see `router models search`."""
    body = await auth.read_body(request, SearchBody, MAX_BYTES)
    console, name = _console(request), user.get_name()
    try:
        number = await asyncio.to_thread(console.searches.start, name, body.categories)
    except (ConfigError, InputError):
        raise
    except RouterError as error:  # another search runs, or a service is unavailable
        raise HTTPException(409, str(error)) from error
    console.search_progress.forget()
    audit.describe(request, f"search {number}", after=", ".join(body.categories or ()) or None)
    return _json({"search": number})


@api.post("/search/undo")
async def undo_search(request: Request, user: auth.Searcher) -> Response:
    """Undo the last change of a discovered model, or all of the last search; see `router models undo`."""
    body = await auth.read_body(request, UndoBody, MAX_BYTES)
    console, name = _console(request), user.get_name()
    undone = await asyncio.to_thread(console.searches.undo, name, body.model)
    console.discovery.forget()
    audit.describe(request, ", ".join(one["model"] for one in undone))
    return _json({"undone": undone})


@api.post("/ask")
async def ask(request: Request, user: auth.Asking) -> StreamingResponse:
    """Answer a prompt; progress and answers are JSON lines."""
    body = await auth.read_body(request, AskBody, MAX_ASK_BYTES)
    lines = await _console(request).asks.stream(body, client_of_user(user.get_name()))
    return StreamingResponse(lines, media_type=EVENTS, headers=STREAM_HEADERS)
