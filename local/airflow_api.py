"""Client of Airflow's public REST API: health, DAGs, runs and logs in addition to Variables."""

from __future__ import annotations

from typing import Any

import requests

from router.errors import AirflowError as AirflowApiError
from router.models import AirflowApi as VariablesApi

__all__ = ["AirflowApi", "AirflowApiError"]


class AirflowApi(VariablesApi):
    """Client of one Airflow; see `router.models.AirflowApi`."""

    def health(self) -> dict[str, bool]:
        """Returns component -> healthy, without login; {} if Airflow does not answer."""
        try:
            response = self._session.get(f"{self.url}/api/v2/monitor/health", timeout=5)
            return {name: part.get("status") == "healthy" for name, part in response.json().items()}
        except (requests.RequestException, ValueError):
            return {}

    def dag_ids(self) -> list[str]:
        """Returns the ids of the parsed DAGs."""
        return [dag["dag_id"] for dag in self.call("GET", "/dags", params={"limit": 100})["dags"]]

    def import_errors(self) -> list[str]:
        """Returns the tracebacks of DAG files that could not be parsed."""
        return [entry["stack_trace"] for entry in self.call("GET", "/importErrors")["import_errors"]]

    def pause(self, dag_id: str, *, paused: bool = True) -> None:
        """Pauses a DAG, or unpauses it with `paused=False`."""
        self.call("PATCH", f"/dags/{dag_id}", json={"is_paused": paused})

    def is_paused(self, dag_id: str) -> bool:
        return bool(self.call("GET", f"/dags/{dag_id}")["is_paused"])

    def trigger(self, dag_id: str, conf: dict[str, Any] | None = None) -> str:
        """Triggers a run and returns its id."""
        body = {"conf": conf or {}, "logical_date": None}
        return str(self.call("POST", f"/dags/{dag_id}/dagRuns", json=body)["dag_run_id"])

    def runs(self, dag_id: str, limit: int = 25) -> list[dict[str, Any]]:
        """Returns the runs of a DAG, newest first."""
        parameters: dict[str, Any] = {"limit": limit, "order_by": "-run_after"}
        runs: list[dict[str, Any]] = self.call("GET", f"/dags/{dag_id}/dagRuns", params=parameters)[
            "dag_runs"
        ]
        return runs

    def task_instances(self, dag_id: str, run_id: str = "~") -> list[dict[str, Any]]:
        """Returns the task instances of a run (`~`: of all runs), one per map index."""
        path = f"/dags/{dag_id}/dagRuns/{run_id}/taskInstances"
        instances: list[dict[str, Any]] = self.call("GET", path, params={"limit": 100})["task_instances"]
        return instances

    def set_task_state(self, dag_id: str, run_id: str, task_id: str, state: str, map_index: int = -1) -> None:
        """Marks a task instance `failed` or `success`, as the UI does."""
        path = f"/dags/{dag_id}/dagRuns/{run_id}/taskInstances/{task_id}"
        path += f"/{map_index}" if map_index >= 0 else ""
        self.call("PATCH", path, json={"new_state": state}, params={"update_mask": "new_state"})

    def task_log(self, dag_id: str, run_id: str, task_id: str, map_index: int = -1, attempt: int = 1) -> str:
        """Returns the log of a task instance as text."""
        path = f"/dags/{dag_id}/dagRuns/{run_id}/taskInstances/{task_id}/logs/{attempt}"
        content = self.call("GET", path, params={"map_index": map_index, "full_content": True})["content"]
        return "\n".join(
            str(line.get("event", line)) if isinstance(line, dict) else str(line) for line in content
        )
