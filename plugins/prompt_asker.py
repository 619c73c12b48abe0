"""Airflow's side of asking: a plain operator that answers one prompt in its own process, and then is done."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

from airflow.sdk import BaseOperator, Connection
from airflow.sdk.definitions.context import Context
from airflow.sdk.exceptions import AirflowFailException
from connections import read_addresses

from router.errors import InputError
from router.settings import config_folder, data_folder, load_config

if TYPE_CHECKING:
    from router.answering import Answer, Event, Router

GRACE_SECONDS = 1.0  # for calls that can bring no better answer, so that their cost is known
OPTIONS = ("category", "model", "deadline_seconds")


class AskPrompt(BaseOperator):
    """Answers the prompt of the run's params, waits a bounded time for a better answer, gives up the rest."""

    def execute(self, context: Context) -> dict[str, Any]:
        """What was asked and by whom it was answered; the answer itself is in the log and in `tasks`."""
        try:
            return asyncio.run(self._ask(dict(context["params"])))
        except InputError as error:  # another try would bring the same
            raise AirflowFailException(str(error)) from None

    async def _ask(self, params: dict[str, Any]) -> dict[str, Any]:
        router = self._router()
        options = {name: params.get(name) or None for name in OPTIONS}
        late_seconds = float(params.get("late_seconds") or 0)
        try:
            answer = await router.answer(str(params.get("prompt") or ""), on_event=self._say, **options)
            self._show(answer)
            end = time.monotonic() + late_seconds
            while better := await router.late(answer, seconds=end - time.monotonic()):
                answer = better
                self._show(answer)
        finally:
            await router.close(grace_seconds=GRACE_SECONDS)
        return {
            "task_id": answer.task_id, "answered_by": answer.model or "knowledge", "late": answer.late,
            "category": answer.category, "call_ids": [str(call.call_id) for call in answer.calls],
        }  # fmt: skip

    def _router(self) -> Router:
        # Not in processes that only load plugins: it brings the search engine with it.
        from router.answering import Router  # noqa: PLC0415

        folder = config_folder()
        return Router(read_addresses(Connection.get), load_config(folder), folder, data_folder())

    def _say(self, event: Event) -> None:
        self.log.info("%.2f s  %s", event.seconds, event.text)

    def _show(self, answer: Answer) -> None:
        giver = answer.model or "knowledge"
        kind = answer.rank.name.lower().replace("_", " ")
        self.log.info("%s%s (%s), %.2f s, $%.6f, task %s", "late: " if answer.late else "", giver, kind,
                      answer.seconds, answer.cost_usd, answer.task_id)  # fmt: skip
        self.log.info("Answer:\n%s", answer.text)
