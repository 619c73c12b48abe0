"""Initial traffic Variables, created from the models in the config."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from local.airflow_api import AirflowApi
from router.models import VARIABLE_PREFIX
from router.settings import load_config
from router.traffic import GRAMMAR


@dataclass(frozen=True)
class TrafficVariable:
    """Initial value of a Variable."""

    key: str
    value: str
    description: str


def traffic_variables(config_folder: Path | None = None) -> list[TrafficVariable]:
    """Returns the Variable of each configured or discovered model; its description is the grammar."""
    config = load_config(config_folder)
    discovered = {name: model for name, model in config.discovered.items() if model.state != "retired"}
    return [
        TrafficVariable(VARIABLE_PREFIX + name, model.target, f"Traffic target of {name}. {GRAMMAR}")
        for name, model in {**config.models, **discovered}.items()
    ]


def create_traffic_variables(api: AirflowApi, config_folder: Path | None = None) -> list[str]:
    """Creates missing Variables and returns their keys. Existing ones stay unchanged."""
    known = api.variables(VARIABLE_PREFIX)
    missing = [variable for variable in traffic_variables(config_folder) if variable.key not in known]
    return [
        variable.key
        for variable in missing
        if api.create_variable(variable.key, variable.value, variable.description)
    ]
