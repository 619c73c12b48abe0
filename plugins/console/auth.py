"""Authorization of the console's routes by Airflow's permissions.

Reading requires permission to read the DAG solve_tasks; prompts, answers and error texts to read its task
logs as well. Pausing requires permission to edit it, editing a target to edit its Variable, retrying, asking
and searching to trigger the DAGs solve_tasks, ask_prompt and nightly_review.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Annotated, Any, TypeVar
from urllib.parse import urlsplit

from airflow.api_fastapi.app import get_auth_manager
from airflow.api_fastapi.auth.managers.models.base_user import BaseUser
from airflow.api_fastapi.auth.managers.models.resource_details import (
    DagAccessEntity,
    DagDetails,
    VariableDetails,
)
from airflow.api_fastapi.core_api.security import GetUserDep
from airflow.configuration import conf
from fastapi import Depends, HTTPException, Request
from pydantic import BaseModel, ValidationError

from router.database import act_as
from router.models import VARIABLE_PREFIX

SOLVE_DAG = "solve_tasks"
ASK_DAG = "ask_prompt"
REVIEW_DAG = "nightly_review"
HEADER = "X-Router-Console"  # forms and pages of other origins cannot set it
FORBIDDEN = 403

Body = TypeVar("Body", bound=BaseModel)


def may_read(user: BaseUser) -> bool:
    """Returns whether the user may read the DAG solve_tasks, and so the console."""
    details = DagDetails(id=SOLVE_DAG, team_name=_team_of_dag(SOLVE_DAG))
    return get_auth_manager().is_authorized_dag(method="GET", details=details, user=user)


def may_read_texts(user: BaseUser) -> bool:
    """Returns whether the user may read the logs of solve_tasks, and so prompts, answers and error texts."""
    details = DagDetails(id=SOLVE_DAG, team_name=_team_of_dag(SOLVE_DAG))
    return get_auth_manager().is_authorized_dag(
        method="GET", access_entity=DagAccessEntity.TASK_LOGS, details=details, user=user
    )


def may_edit(user: BaseUser, model: str) -> bool:
    """Returns whether the user may edit the model's Variable."""
    key = VARIABLE_PREFIX + model
    details = VariableDetails(key=key, team_name=_team_of_variable(key))
    return get_auth_manager().is_authorized_variable(method="PUT", details=details, user=user)


def may_pause(user: BaseUser) -> bool:
    """Returns whether the user may pause the DAG solve_tasks."""
    details = DagDetails(id=SOLVE_DAG, team_name=_team_of_dag(SOLVE_DAG))
    return get_auth_manager().is_authorized_dag(method="PUT", details=details, user=user)


def may_trigger(user: BaseUser, dag: str) -> bool:
    """Returns whether the user may trigger a DAG."""
    details = DagDetails(id=dag, team_name=_team_of_dag(dag))
    return get_auth_manager().is_authorized_dag(
        method="POST", access_entity=DagAccessEntity.RUN, details=details, user=user
    )


def _text_reader(user: GetUserDep) -> bool:
    return may_read_texts(user)


def _reader(user: GetUserDep) -> BaseUser:
    return _require(user, may_read(user))


async def _editor(model: str, request: Request, user: GetUserDep) -> BaseUser:
    return await _writer(request, user, lambda: may_edit(user, model))


async def _asking(request: Request, user: GetUserDep) -> BaseUser:
    return await _writer(request, user, lambda: may_trigger(user, ASK_DAG))


async def _searcher(request: Request, user: GetUserDep) -> BaseUser:
    return await _writer(request, user, lambda: may_trigger(user, REVIEW_DAG))


async def _retrier(request: Request, user: GetUserDep) -> BaseUser:
    return await _writer(request, user, lambda: may_trigger(user, SOLVE_DAG))


async def _pausing(request: Request, user: GetUserDep) -> BaseUser:
    return await _writer(request, user, lambda: may_pause(user))


async def _writer(request: Request, user: BaseUser, may_write: Callable[[], bool]) -> BaseUser:
    """Authorizes a write and names its actor for both audit logs; see `audit.AuditedRoute`."""
    _require_same_origin(request)
    allowed = await asyncio.to_thread(lambda: may_read(user) and may_write())
    request.state.user = _require(user, allowed)
    act_as(user.get_name(), "console")
    return user


Reader = Annotated[BaseUser, Depends(_reader)]
MayReadTexts = Annotated[bool, Depends(_text_reader)]
Editor = Annotated[BaseUser, Depends(_editor)]
Asking = Annotated[BaseUser, Depends(_asking)]
Searcher = Annotated[BaseUser, Depends(_searcher)]
Retrier = Annotated[BaseUser, Depends(_retrier)]
Pausing = Annotated[BaseUser, Depends(_pausing)]


def _require(user: BaseUser, allowed: bool) -> BaseUser:  # noqa: FBT001 - the only argument that matters
    if not allowed:
        raise HTTPException(
            FORBIDDEN, "You do not have permission for this. Ask an administrator of Airflow."
        )
    return user


def _require_same_origin(request: Request) -> None:
    """Raises 403 for a write that a page of another origin made the browser send."""
    site = request.headers.get("sec-fetch-site")
    origin = request.headers.get("origin")
    foreign = site is not None and site != "same-origin"
    if origin is not None and site is None:
        foreign = urlsplit(origin).netloc != request.headers.get("host")
    if foreign or HEADER not in request.headers:
        raise HTTPException(
            FORBIDDEN, f"Writes must come from the console's own page, with the header {HEADER}: 1."
        )


async def read_body(request: Request, kind: type[Body], max_bytes: int) -> Body:
    """Parses the JSON body. Raises 413 if it is too large, 415 if not JSON, 422 if invalid."""
    if request.headers.get("content-type", "").split(";")[0].strip() != "application/json":
        raise HTTPException(415, "Send application/json.")
    content = bytearray()
    async for part in request.stream():
        content += part
        if len(content) > max_bytes:
            raise HTTPException(413, f"The body is larger than {max_bytes:,} bytes.")
    try:
        return kind.model_validate_json(bytes(content))
    except ValidationError as error:
        raise HTTPException(422, _first_error(error)) from error


def _first_error(error: ValidationError) -> str:
    first: Any = error.errors(include_url=False, include_input=False, include_context=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    return f"{where}: {first['msg']}" if where else str(first["msg"])


def _team_of_dag(dag: str) -> str | None:
    if not conf.getboolean("core", "multi_team"):
        return None
    from airflow.models.dag import DagModel  # noqa: PLC0415 - needed with teams only

    return DagModel.get_team_name(dag)


def _team_of_variable(key: str) -> str | None:
    if not conf.getboolean("core", "multi_team"):
        return None
    from airflow.models.variable import Variable  # noqa: PLC0415 - needed with teams only

    return Variable.get_team_name(key)
