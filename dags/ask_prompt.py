"""Answers one prompt from a form."""

from __future__ import annotations

from airflow.sdk import Param, dag
from prompt_asker import AskPrompt

DOC = """
### ask_prompt
Answers one prompt. **Trigger** opens the form. The answer is in the log of the Airflow task `ask` and in the
table `tasks`.

The preferred model of the prompt's category and a fallback are called in parallel. If the answer at the
deadline is not the preferred model's, the Airflow task waits up to `late_seconds` for a better one, then
cancels the calls still in progress; `router log` shows them as `abandoned`. If no model answered, the Airflow
task fails; its log has the reasons, and the retrieved passages if there are any.

Works without scheduler and triggerer:

    airflow dags test ask_prompt -c '{"prompt": "Why is the sky blue?"}'
"""


@dag(
    schedule=None,
    catchup=False,
    max_active_runs=50,
    doc_md=DOC,
    tags=["router"],
    params={
        "prompt": Param(
            "Why is the sky blue?", type="string", format="multiline", minLength=1, maxLength=1_000_000,
            title="Prompt", description="The text to answer.",
        ),
        "category": Param(
            None, type=["null", "string"], title="Category", description="Empty: chosen by the classifier."
        ),
        "model": Param(
            None, type=["null", "string"], title="Model", description="Call only this model. Empty: the best."
        ),
        "deadline_seconds": Param(
            None, type=["null", "number"], minimum=0.05, maximum=3600, title="Deadline in seconds",
            description="Empty: the deadline of the category.",
        ),
        "late_seconds": Param(
            60, type="number", minimum=0, maximum=3600, title="Wait for a better answer, in seconds",
            description="After a provisional answer.",
        ),
    },
)  # fmt: skip
def ask_prompt() -> None:
    AskPrompt(task_id="ask")


ask_prompt()
