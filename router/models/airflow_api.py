"""A small synchronous client of Airflow's public REST API: log in, and read and set Variables."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

import requests
from typing_extensions import Self

from router.errors import AirflowError

VARIABLE_PREFIX = "traffic."  # of the Variable that holds a model's traffic target
TIMEOUT_SECONDS = 30.0
LONGEST_WORDS = 500


class AirflowApi:
    """`url` is where Airflow's page is. Logs in at the first call, and again when the token has run out."""

    def __init__(
        self, url: str, user: str, password: str, *, timeout_seconds: float = TIMEOUT_SECONDS
    ) -> None:
        self.url = url.rstrip("/")
        self._user = user
        self._password = password
        self._timeout_seconds = timeout_seconds
        self._session = requests.Session()
        self._session.trust_env = False  # a proxy has no part in this

    def close(self) -> None:
        """End the connections; the client can be used again."""
        self._session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def login(self) -> str:
        """A fresh bearer token; it is used for the calls that follow."""
        body = {"username": self._user, "password": self._password}
        token = str(self._send("POST", "/auth/token", json=body)["access_token"])
        self._session.headers["Authorization"] = f"Bearer {token}"
        return token

    def call(self, method: str, path: str, **arguments: Any) -> Any:
        """One call of `/api/v2<path>`; its JSON, or None. AirflowError carries the status of a refusal."""
        if "Authorization" not in self._session.headers:
            self.login()
        try:
            return self._send(method, f"/api/v2{path}", **arguments)
        except AirflowError as error:
            if error.status != requests.codes.unauthorized:
                raise
        self.login()
        return self._send(method, f"/api/v2{path}", **arguments)

    def variables(self, prefix: str = "") -> dict[str, str]:
        """All Variables whose key starts with `prefix`."""
        found: dict[str, str] = {}
        read, total = 0, 1
        while read < total:
            parameters = {"limit": 100, "offset": read, "variable_key_pattern": f"{prefix}%"}
            page = self.call("GET", "/variables", params=parameters)
            total = page["total_entries"]
            if not page["variables"]:
                break
            read += len(page["variables"])
            found |= {entry["key"]: entry["value"] for entry in page["variables"]}
        return {key: value for key, value in found.items() if key.startswith(prefix)}

    def set_variable(self, key: str, value: str, description: str | None = None) -> None:
        """Create the Variable, or change its value; a description that is not given stays."""
        body: dict[str, str] = {"key": key, "value": value}
        if description is not None:
            body["description"] = description
        try:
            mask = {} if description is not None else {"update_mask": "value"}
            self.call("PATCH", f"/variables/{quote(key, safe='')}", json=body, params=mask)
        except AirflowError as error:
            if error.status != requests.codes.not_found:
                raise
            self.call("POST", "/variables", json=body)

    def create_variable(self, key: str, value: str, description: str = "") -> bool:
        """Create the Variable unless it is there; tells whether it was created."""
        try:
            self.call("POST", "/variables", json={"key": key, "value": value, "description": description})
        except AirflowError as error:
            if error.status == requests.codes.conflict:
                return False
            raise
        return True

    def delete_variable(self, key: str) -> None:
        """Delete the Variable; one that is not there is an AirflowError with status 404."""
        self.call("DELETE", f"/variables/{quote(key, safe='')}")

    def _send(self, method: str, path: str, **arguments: Any) -> Any:
        try:
            answer = self._session.request(
                method, self.url + path, timeout=self._timeout_seconds, **arguments
            )
        except requests.RequestException as error:
            raise AirflowError(f"Airflow at {self.url} cannot be reached: {_reason(error)}.") from error
        if not answer.ok:
            words = answer.text[:LONGEST_WORDS]
            raise AirflowError(
                f"{method} {path}: Airflow answered {answer.status_code}: {words}", answer.status_code
            )
        try:
            return answer.json() if answer.content else None
        except ValueError as error:
            raise AirflowError(
                f"{method} {path}: {self.url} did not answer as Airflow does: no JSON."
            ) from error


def _reason(error: requests.RequestException) -> str:
    if isinstance(error, requests.Timeout):
        return "it did not answer in time"
    if isinstance(error, requests.ConnectionError):
        return "no connection"
    return str(error)
