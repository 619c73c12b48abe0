"""What the stack asks of Airflow's public REST API beyond Variables: its health, DAGs and runs."""

from __future__ import annotations

from typing import Any

import requests

from router.errors import AirflowError as AirflowApiError
from router.models import AirflowApi as VariablesApi

__all__ = ["AirflowApi", "AirflowApiError"]


class AirflowApi(VariablesApi):
    """`url` is where Airflow's page is. Logs in at the first call, and again when the token has run out."""

    def health(self) -> dict[str, bool]:
        """Each of Airflow's parts and whether it says it is well; needs no login. {} if nobody answers."""
        try:
            answer = self._session.get(f"{self.url}/api/v2/monitor/health", timeout=5)
            return {name: part.get("status") == "healthy" for name, part in answer.json().items()}
        except (requests.RequestException, ValueError):
            return {}

    def dag_ids(self) -> list[str]:
        """The DAGs that Airflow has parsed."""
        return [dag["dag_id"] for dag in self.call("GET", "/dags", params={"limit": 100})["dags"]]

    def import_errors(self) -> list[str]:
        """The tracebacks of DAG files that could not be parsed."""
        return [entry["stack_trace"] for entry in self.call("GET", "/importErrors")["import_errors"]]

    def pause(self, dag_id: str, *, paused: bool = True) -> None:
        """Pause the DAG, or let it run with `paused=False`."""
        self.call("PATCH", f"/dags/{dag_id}", json={"is_paused": paused})

    def is_paused(self, dag_id: str) -> bool:
        return bool(self.call("GET", f"/dags/{dag_id}")["is_paused"])

    def trigger(self, dag_id: str, conf: dict[str, Any] | None = None) -> str:
        """Start a run; its run id."""
        body = {"conf": conf or {}, "logical_date": None}
        return str(self.call("POST", f"/dags/{dag_id}/dagRuns", json=body)["dag_run_id"])

    def runs(self, dag_id: str, limit: int = 25) -> list[dict[str, Any]]:
        """The DAG's runs, newest first."""
        parameters: dict[str, Any] = {"limit": limit, "order_by": "-run_after"}
        runs: list[dict[str, Any]] = self.call("GET", f"/dags/{dag_id}/dagRuns", params=parameters)[
            "dag_runs"
        ]
        return runs

    def task_instances(self, dag_id: str, run_id: str = "~") -> list[dict[str, Any]]:
        """The Airflow tasks of a run (`~`: of all runs), mapped ones each for itself."""
        path = f"/dags/{dag_id}/dagRuns/{run_id}/taskInstances"
        instances: list[dict[str, Any]] = self.call("GET", path, params={"limit": 100})["task_instances"]
        return instances

    def set_task_state(self, dag_id: str, run_id: str, task_id: str, state: str, map_index: int = -1) -> None:
        """Mark an Airflow task `failed` or `success`, as a person does in the UI."""
        path = f"/dags/{dag_id}/dagRuns/{run_id}/taskInstances/{task_id}"
        path += f"/{map_index}" if map_index >= 0 else ""
        self.call("PATCH", path, json={"new_state": state}, params={"update_mask": "new_state"})

    def task_log(self, dag_id: str, run_id: str, task_id: str, map_index: int = -1, attempt: int = 1) -> str:
        """The text of an Airflow task's log."""
        path = f"/dags/{dag_id}/dagRuns/{run_id}/taskInstances/{task_id}/logs/{attempt}"
        content = self.call("GET", path, params={"map_index": map_index, "full_content": True})["content"]
        return "\n".join(
            str(line.get("event", line)) if isinstance(line, dict) else str(line) for line in content
        )
