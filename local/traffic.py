"""The Variables by which the operator sets each model's traffic, made from `config/models.yaml`."""

from __future__ import annotations

from pathlib import Path

from local.airflow_api import AirflowApi
from router.settings import load_config
from router.traffic import GRAMMAR

PREFIX = "traffic."


def create_traffic_variables(api: AirflowApi, config_folder: Path | None = None) -> list[str]:
    """Make `traffic.<model>` for each model that has none; the names made. What is there is never touched."""
    models = load_config(config_folder).models
    known = api.variables(PREFIX)
    missing = [name for name in models if PREFIX + name not in known]
    return [
        name
        for name in missing
        if api.create_variable(PREFIX + name, models[name].target, f"What {name} may be sent. {GRAMMAR}")
    ]
