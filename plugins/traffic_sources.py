"""Sources of the `traffic.<model>` Variables that come before Airflow's database, in Airflow's own order.

Airflow looks a Variable up in a secrets backend, if one is configured, then in the environment, then in its
database. These sources cannot list their Variables: each model's is looked up by name.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from router.models import VARIABLE_PREFIX

log = logging.getLogger("router.traffic_variables")

BACKEND_SECONDS = 10.0  # a secrets backend may be slow, or bill each request
ENVIRONMENT = "AIRFLOW_VAR_"


@dataclass(frozen=True, slots=True)
class SourcedLine:
    """Text of a Variable, and where it was found."""

    line: str
    source: str


class EarlierSources:
    """Looks up Variables in the sources before the database. A source that fails keeps its last answers."""

    def __init__(self) -> None:
        self._read_at: dict[int, float] = {}
        self._known: dict[int, dict[str, str | None]] = {}

    def read(self, models: Iterable[str]) -> dict[str, SourcedLine]:
        """Returns model -> its line, for models that have one in an earlier source."""
        found: dict[str, SourcedLine] = {}
        for place, backend in enumerate(_backends_before_database()):
            for model, line in self._lines(place, backend, list(models)).items():
                if line is not None and model not in found:
                    found[model] = SourcedLine(line, _source(backend, model))
        return found

    def _lines(self, place: int, backend: Any, models: list[str]) -> Mapping[str, str | None]:
        known = self._known.setdefault(place, {})
        now = time.monotonic()
        seconds = 0.0 if _is_environment(backend) else BACKEND_SECONDS
        due = now - self._read_at.get(place, -BACKEND_SECONDS) >= seconds
        for model in models:
            if due or model not in known:
                try:
                    known[model] = backend.get_variable(key=VARIABLE_PREFIX + model)
                except Exception as error:  # noqa: BLE001 - any backend's own
                    known.setdefault(model, None)
                    log.warning(
                        "reading a traffic Variable failed: source=%s model=%s error=%s",
                        type(backend).__name__, model, type(error).__name__,
                    )  # fmt: skip
        if due:
            self._read_at[place] = now
        return known


def sources_report(found: Mapping[str, SourcedLine], stored: Mapping[str, str | None]) -> str:
    """Returns the sources as `replace_worker_reports` takes them."""
    return json.dumps([
        {
            "model": model,
            "code": "target_source",
            "detail": entry.source + _ignored(entry.line, stored.get(model)),
            "age_seconds": 0,
        }
        for model, entry in sorted(found.items())
    ])  # fmt: skip


def _ignored(line: str, stored: str | None) -> str:
    if stored is None or stored.strip() == line.strip():
        return ""
    return "; the different value in Airflow's database is ignored"


def _backends_before_database() -> list[Any]:
    from airflow.configuration import ensure_secrets_loaded  # noqa: PLC0415 - not in processes that only parse
    from airflow.secrets.metastore import MetastoreBackend  # noqa: PLC0415 - the same

    backends = ensure_secrets_loaded()
    places = [place for place, one in enumerate(backends) if isinstance(one, MetastoreBackend)]
    return backends[: places[0]] if places else backends


def _is_environment(backend: Any) -> bool:
    return type(backend).__name__ == "EnvironmentVariablesBackend"


def _source(backend: Any, model: str) -> str:
    if _is_environment(backend):
        return f"environment variable {ENVIRONMENT}{(VARIABLE_PREFIX + model).upper()}"
    return f"secrets backend {type(backend).__name__}"
