"""The Variables by which the operator sets each model's traffic, made from the config's models."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from local.airflow_api import AirflowApi
from router.settings import load_config
from router.traffic import GRAMMAR

PREFIX = "traffic."


@dataclass(frozen=True)
class TrafficVariable:
    """One Variable as it is first made."""

    key: str
    value: str
    description: str


def traffic_variables(config_folder: Path | None = None) -> list[TrafficVariable]:
    """`traffic.<model>` for each model in use, people's and the search's; the description is the grammar."""
    config = load_config(config_folder)
    found = {name: model for name, model in config.discovered.items() if model.state != "retired"}
    return [
        TrafficVariable(PREFIX + name, model.target, f"What {name} may be sent. {GRAMMAR}")
        for name, model in {**config.models, **found}.items()
    ]


def create_traffic_variables(api: AirflowApi, config_folder: Path | None = None) -> list[str]:
    """Make those that are missing, and tell which; what is there is never touched."""
    known = api.variables(PREFIX)
    missing = [variable for variable in traffic_variables(config_folder) if variable.key not in known]
    return [
        variable.key
        for variable in missing
        if api.create_variable(variable.key, variable.value, variable.description)
    ]
