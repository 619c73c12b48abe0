"""Synchronous client of Airflow's public REST API: login, and Variables."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

import requests
from typing_extensions import Self

from router.errors import AirflowError, InputError, first_line
from router.settings import AIRFLOW_SOURCE, HttpAddress

VARIABLE_PREFIX = "traffic."  # of the Variable that holds a model's traffic target
MASK = "***"  # Airflow's REST API returns it instead of a value that may be a secret
TIMEOUT_SECONDS = 30.0
MAX_ERROR_CHARACTERS = 500


class AirflowApi:
    """Client of the Airflow at `url`. Logs in at the first call, and again when the token has expired.

    Every method raises AirflowError, with the HTTP status if Airflow rejected the request.
    """

    def __init__(
        self, url: str, user: str, password: str, *, timeout_seconds: float = TIMEOUT_SECONDS
    ) -> None:
        """A login in the URL applies if none is given. Raises ConfigError if it is not an http(s) URL."""
        address = HttpAddress.parse(url, AIRFLOW_SOURCE)
        self.url = address.url
        self._user = user or address.user or ""
        self._password = password or address.password or ""
        self._timeout_seconds = timeout_seconds
        self._session = requests.Session()
        self._session.trust_env = False  # bypasses proxies of the environment

    def close(self) -> None:
        """Closes the connections; the client can be used again."""
        self._session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def login(self) -> str:
        """Returns a new bearer token, which later calls use."""
        body = {"username": self._user, "password": self._password}
        token = str(self._send("POST", "/auth/token", json=body)["access_token"])
        self._session.headers["Authorization"] = f"Bearer {token}"
        return token

    def call(self, method: str, path: str, **arguments: Any) -> Any:
        """Calls `/api/v2<path>` and returns its JSON, or None for an empty reply."""
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
        """Reads all Variables whose key starts with `prefix`.

        Airflow returns MASK for a value whose key contains `token`, `secret`, `proxy` or the like.
        """
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
        """Creates the Variable or changes its value; a description that is not given is preserved."""
        _refuse_mask(key, value)
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
        """Creates the Variable unless it exists; returns whether it was created."""
        _refuse_mask(key, value)
        try:
            self.call("POST", "/variables", json={"key": key, "value": value, "description": description})
        except AirflowError as error:
            if error.status == requests.codes.conflict:
                return False
            raise
        return True

    def delete_variable(self, key: str) -> None:
        """Deletes the Variable; status 404 if it does not exist."""
        self.call("DELETE", f"/variables/{quote(key, safe='')}")

    def _send(self, method: str, path: str, **arguments: Any) -> Any:
        try:
            answer = self._session.request(
                method, self.url + path, timeout=self._timeout_seconds, **arguments
            )
        except requests.RequestException as error:
            raise AirflowError(f"Airflow at {self.url} cannot be reached: {_reason(error)}.") from error
        if not answer.ok:
            text = answer.text[:MAX_ERROR_CHARACTERS].replace(self._password or "***", "***")
            raise AirflowError(
                f"{method} {path}: Airflow answered {answer.status_code}: {text}", answer.status_code
            )
        try:
            return answer.json() if answer.content else None
        except ValueError as error:
            raise AirflowError(
                f"{method} {path}: {self.url} did not answer with JSON, as Airflow does."
            ) from error


def _refuse_mask(key: str, value: str) -> None:
    if value.strip() == MASK:
        raise InputError(
            f"The Variable {key} is not set to {MASK}, which Airflow shows instead of a masked value. Set the"
            " value itself."
        )


def _reason(error: requests.RequestException) -> str:
    if isinstance(error, requests.Timeout):
        return "it did not answer in time"
    if isinstance(error, requests.ConnectionError):
        return "no connection"
    return first_line(error)
