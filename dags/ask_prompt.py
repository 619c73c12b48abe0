"""Answers one prompt, given in a form."""

from __future__ import annotations

from airflow.sdk import Param, dag
from prompt_asker import AskPrompt

DOC = """
### ask_prompt
Answers one prompt now. **Trigger** shows the form; the answer stands in the log of the Airflow task `ask`,
and in the table `tasks`.

The model that is best for the prompt's category and a fallback are asked at once. If the answer in time is
not the best model's, the Airflow task waits `late_seconds` for a better one and gives up what is then still
under way; the call log (`router log`) says so.

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
            title="Prompt", description="What is to be answered.",
        ),
        "category": Param(
            None, type=["null", "string"], title="Category", description="Empty: the router finds it."
        ),
        "model": Param(
            None, type=["null", "string"], title="Model", description="Ask this model only. Empty: the best."
        ),
        "deadline_seconds": Param(
            None, type=["null", "number"], exclusiveMinimum=0, maximum=3600, title="Deadline in seconds",
            description="When there must be an answer. Empty: the category's.",
        ),
        "late_seconds": Param(
            60, type="number", minimum=0, maximum=3600, title="Wait for a better answer, in seconds",
            description="How long after a provisional answer.",
        ),
    },
)  # fmt: skip
def ask_prompt() -> None:
    AskPrompt(task_id="ask")


ask_prompt()
