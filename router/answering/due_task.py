"""Answers a task of the batch whose deadline is near, provisionally, with a fallback."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from router.answering.attempt import Attempt
from router.answering.context import RequestContext
from router.answering.fallback import call_in_turn, request_with, search, store_passages
from router.answering.plan import RoutingPlan
from router.answering.policy import permit_patience
from router.answering.store import DueTask, RequestTask
from router.answering.task_record import TaskRecord
from router.background import cancel_and_wait
from router.request import ModelRequest
from router.task import Role

MIN_SECONDS = 10.0  # for a fallback model, also once the deadline has passed
NUMBER = 0  # a provisional answer does not count as an attempt of the task


async def answer_due_task(context: RequestContext, due: DueTask, is_paused: Callable[[], bool]) -> bool:
    """Stores a fallback model's answer, or the passages at the deadline; returns whether a model answered.

    The task stays unsolved: the chosen model's answer replaces either of them. Once `is_paused`, no further
    model is called. Raises DatabaseError.
    """
    request = due.request or ModelRequest.of_prompt(due.prompt)
    found = await search(context, request.conversation, due.client)
    record = TaskRecord(context, request, due.seconds_left, RequestTask(due.task_id, due.prompt_version))
    plan = RoutingPlan.of(
        context.roster(), context.config, due.category, due.confidence, max_tokens=due.max_tokens,
        request=request, client=due.client,
    )  # fmt: skip
    calling = asyncio.get_running_loop().create_task(
        _call_models(record, plan, request_with(request, found, context.config.fallback), is_paused),
        name=f"router fallback of task {due.task_id}",
    )
    try:
        await asyncio.wait({calling}, timeout=max(0.0, due.seconds_left))
        if not calling.done() or not calling.result():
            await store_passages(record, plan, found, NUMBER)
        return await calling
    finally:
        await cancel_and_wait(calling)


async def _call_models(
    record: TaskRecord, plan: RoutingPlan, request: ModelRequest, is_paused: Callable[[], bool]
) -> bool:
    seconds = max(MIN_SECONDS, record.deadline_seconds)
    patience = permit_patience(seconds, record.context.config.answering.permit_seconds)

    async def call(model: str, until: float) -> Attempt:
        attempt = Attempt(record, plan, Role.FALLBACK, model, request, number=NUMBER)
        await attempt.run(patience, until)
        await attempt.close()
        return attempt

    return await call_in_turn(
        plan, call, until=time.monotonic() + seconds, patience_seconds=patience,
        may_continue=lambda: not is_paused(),
    )  # fmt: skip
