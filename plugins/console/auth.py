"""Who is there, and what they may do: every route of the console asks Airflow.

Reading is for those who may read the DAG solve_tasks, editing a target for those who may edit its Variable,
asking and retrying for those who may trigger the DAGs that do the same.
"""

from __future__ import annotations

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

from router.models import VARIABLE_PREFIX

SOLVE_DAG = "solve_tasks"
ASK_DAG = "ask_prompt"
HEADER = "X-Router-Console"  # no form and no foreign page can send it unasked
FORBIDDEN = 403

Body = TypeVar("Body", bound=BaseModel)


def may_read(user: BaseUser) -> bool:
    """Whether this person may read the DAG that solves tasks, and so the console."""
    details = DagDetails(id=SOLVE_DAG, team_name=_team_of_dag(SOLVE_DAG))
    return get_auth_manager().is_authorized_dag(method="GET", details=details, user=user)


def may_edit(user: BaseUser, model: str) -> bool:
    """Whether this person may edit the model's Variable."""
    key = VARIABLE_PREFIX + model
    details = VariableDetails(key=key, team_name=_team_of_variable(key))
    return get_auth_manager().is_authorized_variable(method="PUT", details=details, user=user)


def may_trigger(user: BaseUser, dag: str) -> bool:
    """Whether this person may trigger this DAG."""
    details = DagDetails(id=dag, team_name=_team_of_dag(dag))
    return get_auth_manager().is_authorized_dag(
        method="POST", access_entity=DagAccessEntity.RUN, details=details, user=user
    )


def _reader(user: GetUserDep) -> BaseUser:
    return _let(user, may_read(user))


def _editor(model: str, request: Request, user: GetUserDep) -> BaseUser:
    _same_origin(request)
    return _let(user, may_read(user) and may_edit(user, model))


def _asker(request: Request, user: GetUserDep) -> BaseUser:
    _same_origin(request)
    return _let(user, may_read(user) and may_trigger(user, ASK_DAG))


def _retrier(request: Request, user: GetUserDep) -> BaseUser:
    _same_origin(request)
    return _let(user, may_read(user) and may_trigger(user, SOLVE_DAG))


Reader = Annotated[BaseUser, Depends(_reader)]
Editor = Annotated[BaseUser, Depends(_editor)]
Asking = Annotated[BaseUser, Depends(_asker)]
Retrier = Annotated[BaseUser, Depends(_retrier)]


def _let(user: BaseUser, allowed: bool) -> BaseUser:  # noqa: FBT001 - it is the whole question
    if not allowed:
        raise HTTPException(FORBIDDEN, "You may not do this. Ask whoever gives rights in Airflow.")
    return user


def _same_origin(request: Request) -> None:
    """Refuse a write that another page made this person's browser send."""
    site = request.headers.get("sec-fetch-site")
    origin = request.headers.get("origin")
    foreign = site is not None and site != "same-origin"
    if origin is not None and site is None:
        foreign = urlsplit(origin).netloc != request.headers.get("host")
    if foreign or HEADER not in request.headers:
        raise HTTPException(FORBIDDEN, f"Writes are taken from the console's own page, with {HEADER}: 1.")


async def read_body(request: Request, kind: type[Body], most_bytes: int) -> Body:
    """The request's JSON body as a `kind`; 413 if it is longer, 415 if it is no JSON, 422 if it is wrong."""
    if request.headers.get("content-type", "").split(";")[0].strip() != "application/json":
        raise HTTPException(415, "Send application/json.")
    whole = bytearray()
    async for part in request.stream():
        whole += part
        if len(whole) > most_bytes:
            raise HTTPException(413, f"At most {most_bytes:,} bytes are taken.")
    try:
        return kind.model_validate_json(bytes(whole))
    except ValidationError as error:
        raise HTTPException(422, _first_fault(error)) from error


def _first_fault(error: ValidationError) -> str:
    fault: Any = error.errors(include_url=False, include_input=False, include_context=False)[0]
    where = ".".join(str(part) for part in fault["loc"])
    return f"{where}: {fault['msg']}" if where else str(fault["msg"])


def _team_of_dag(dag: str) -> str | None:
    if not conf.getboolean("core", "multi_team"):
        return None
    from airflow.models.dag import DagModel  # noqa: PLC0415 - only where teams are used

    return DagModel.get_team_name(dag)


def _team_of_variable(key: str) -> str | None:
    if not conf.getboolean("core", "multi_team"):
        return None
    from airflow.models.variable import Variable  # noqa: PLC0415 - only where teams are used

    return Variable.get_team_name(key)
