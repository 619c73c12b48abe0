"""A small synchronous client of Airflow's public REST API: log in, Variables, DAGs, runs."""

from __future__ import annotations

from typing import Any

import requests
from typing_extensions import Self

TIMEOUT_SECONDS = 30.0


class AirflowApiError(RuntimeError):
    """Airflow refused, in its own words, or could not be reached: then `status` is None."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class AirflowApi:
    """`url` is where Airflow's page is. Logs in at the first call, and again when the token has run out."""

    def __init__(self, url: str, user: str, password: str) -> None:
        self.url = url.rstrip("/")
        self._user = user
        self._password = password
        self._session = requests.Session()
        self._session.trust_env = False  # a proxy has no part in this

    def close(self) -> None:
        """End the connections; the client can be used again."""
        self._session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def health(self) -> dict[str, bool]:
        """Each of Airflow's parts and whether it says it is well; needs no login. {} if nobody answers."""
        try:
            answer = self._session.get(f"{self.url}/api/v2/monitor/health", timeout=5)
            return {name: part.get("status") == "healthy" for name, part in answer.json().items()}
        except (requests.RequestException, ValueError):
            return {}

    def login(self) -> str:
        """A fresh bearer token; it is used for the calls that follow."""
        body = {"username": self._user, "password": self._password}
        token = self._send("POST", "/auth/token", json=body)["access_token"]
        self._session.headers["Authorization"] = f"Bearer {token}"
        return str(token)

    def call(self, method: str, path: str, **arguments: Any) -> Any:
        """One call of `/api/v2<path>`; its JSON, or None. AirflowApiError carries the status of a refusal."""
        if "Authorization" not in self._session.headers:
            self.login()
        try:
            return self._send(method, f"/api/v2{path}", **arguments)
        except AirflowApiError as error:
            if error.status != requests.codes.unauthorized:
                raise
        self.login()
        return self._send(method, f"/api/v2{path}", **arguments)

    def variables(self, prefix: str = "") -> dict[str, str]:
        """All Variables whose key starts with `prefix`."""
        found: dict[str, str] = {}
        total = 1
        while len(found) < total:
            parameters = {"limit": 100, "offset": len(found), "variable_key_pattern": f"{prefix}%"}
            page = self.call("GET", "/variables", params=parameters)
            total = page["total_entries"]
            if not page["variables"]:
                break
            found |= {entry["key"]: entry["value"] for entry in page["variables"]}
        return {key: value for key, value in found.items() if key.startswith(prefix)}

    def set_variable(self, key: str, value: str, description: str | None = None) -> None:
        """Create the Variable, or change its value; a description that is not given stays."""
        body: dict[str, str] = {"key": key, "value": value}
        if description is not None:
            body["description"] = description
        try:
            mask = {} if description is not None else {"update_mask": "value"}
            self.call("PATCH", f"/variables/{key}", json=body, params=mask)
        except AirflowApiError as error:
            if error.status != requests.codes.not_found:
                raise
            self.call("POST", "/variables", json=body)

    def create_variable(self, key: str, value: str, description: str = "") -> bool:
        """Create the Variable unless it is there; tells whether it was created."""
        try:
            self.call("POST", "/variables", json={"key": key, "value": value, "description": description})
        except AirflowApiError as error:
            if error.status == requests.codes.conflict:
                return False
            raise
        return True

    def delete_variable(self, key: str) -> None:
        """Delete the Variable; one that is not there is an AirflowApiError with status 404."""
        self.call("DELETE", f"/variables/{key}")

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

    def _send(self, method: str, path: str, **arguments: Any) -> Any:
        try:
            answer = self._session.request(method, self.url + path, timeout=TIMEOUT_SECONDS, **arguments)
        except requests.RequestException as error:
            raise AirflowApiError(f"Airflow at {self.url} cannot be reached: {error}") from error
        if not answer.ok:
            words = answer.text[:500]
            raise AirflowApiError(
                f"{method} {path}: Airflow answered {answer.status_code}: {words}", answer.status_code
            )
        return answer.json() if answer.content else None
