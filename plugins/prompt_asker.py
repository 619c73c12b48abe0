"""Airflow operator that answers one prompt in its own process."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

from airflow.sdk import BaseOperator, Connection
from airflow.sdk.definitions.context import Context
from airflow.sdk.exceptions import AirflowFailException
from connections import read_addresses

from router.database import act_as, connect
from router.errors import DatabaseError, InputError, printable
from router.settings import config_folder, data_folder, load_config
from router.status import record_audit
from router.task import client_of_user

if TYPE_CHECKING:
    from router.answering import Answer, Event, Router

GRACE_SECONDS = 1.0  # for calls that cannot improve the answer, so that their cost is logged
OPTIONS = ("category", "model", "deadline_seconds")


class AskPrompt(BaseOperator):
    """Answers the prompt in the run's params and waits up to `late_seconds` for a better answer."""

    def execute(self, context: Context) -> dict[str, Any]:
        """Returns the task's id and who answered; the answer itself is in the log and in `tasks`.

        Fails without a retry if no model answered.
        """
        user = getattr(context.get("dag_run"), "triggering_user_name", None)
        act_as(user or self.dag_id, "dag")
        try:
            answer = asyncio.run(self._ask(dict(context["params"]), client_of_user(user)))
        except InputError as error:  # a retry would fail as well
            raise AirflowFailException(str(error)) from None
        if answer.model is None:
            raise AirflowFailException(f"Task {answer.task_id}: {answer.text}")
        return {
            "task_id": answer.task_id, "answered_by": answer.model, "late": answer.late,
            "category": answer.category, "call_ids": [str(call.call_id) for call in answer.calls],
        }  # fmt: skip

    async def _ask(self, params: dict[str, Any], client: str) -> Answer:
        router = self._router()
        options = {name: None if (value := params.get(name)) == "" else value for name in OPTIONS}
        late_seconds = float(params.get("late_seconds") or 0)
        try:
            prompt = str(params.get("prompt") or "")
            answer = await router.answer(prompt, client=client, on_event=self._log_event, **options)
            self._log_answer(answer)
            if answer.task_id is not None:
                await asyncio.to_thread(self._audit, router.addresses.database_url, answer.task_id)
            end = time.monotonic() + late_seconds
            while better := await router.late(answer, seconds=end - time.monotonic()):
                answer = better
                self._log_answer(answer)
        finally:
            await router.close(grace_seconds=GRACE_SECONDS)
        return answer

    def _audit(self, database_url: str, task_id: int) -> None:
        try:
            with connect(database_url) as connection:
                record_audit(connection, "ask", f"task {task_id}")
        except DatabaseError as error:
            self.log.warning("The audit log has no entry: %s", error)

    def _router(self) -> Router:
        # Imported here, as it loads the search engine, which other Airflow processes do not need.
        from router.answering import Router  # noqa: PLC0415

        folder = config_folder()
        return Router(read_addresses(Connection.get), load_config(folder), folder, data_folder())

    def _log_event(self, event: Event) -> None:
        self.log.info("%.2f s  %s", event.seconds, printable(event.text, one_line=True))

    def _log_answer(self, answer: Answer) -> None:
        source = answer.model or "knowledge"
        kind = answer.rank.name.lower().replace("_", " ")
        self.log.info("%s%s (%s), %.2f s, $%.6f, task %s", "late: " if answer.late else "", source, kind,
                      answer.seconds, answer.cost_usd, answer.task_id)  # fmt: skip
        self.log.info("Answer:\n%s", printable(answer.text))
