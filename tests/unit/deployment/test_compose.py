"""docker-compose.yaml, checked without Docker: schema, secrets and commands."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tests.support.command_line import CommandLine

ROOT = Path(__file__).parents[3]
COMPOSE = ROOT / "docker-compose.yaml"
AIRFLOW_SERVICES = ("api-server", "scheduler", "dag-processor", "triggerer")
SECRET_NAME = re.compile(r"PASSWORD|SECRET|FERNET|_CONN|AUTH$|DATABASE_URL|REDIS_URL|API_KEY")
NOT_SECRET = re.compile(r"SENSITIVE_VAR_CONN_NAMES|PASSWORDS_FILE|CONN_MODELS_BACKEND$")

# One interpreter for all commands, because each start takes seconds.
PARSE_ALL = """
import json, sys
from airflow.cli.cli_parser import get_parser
for command in json.loads(sys.argv[1]):
    get_parser().parse_args(command)
"""


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(COMPOSE.read_text())
    return loaded


def texts(value: Any) -> list[str]:
    """Returns every string in a nested value."""
    if isinstance(value, dict):
        return [text for item in value.values() for text in texts(item)]
    if isinstance(value, list):
        return [text for item in value for text in texts(item)]
    return [str(value)]


def test_schema(compose: dict[str, Any]) -> None:
    schema = files("check_jsonschema") / "builtin_schemas" / "vendor" / "compose-spec.json"
    jsonschema.validate(compose, json.loads(schema.read_text()))


def test_every_secret_is_required_and_has_no_default(compose: dict[str, Any]) -> None:
    secrets = {
        (name, key): value
        for name, service in compose["services"].items()
        for key, value in service.get("environment", {}).items()
        if SECRET_NAME.search(key) and not NOT_SECRET.search(key)
    }
    assert len(secrets) > 20
    optional = {key for (_, key), value in secrets.items() if ":?" not in value}
    assert optional == {"LLAMA_API_KEY"}  # the simulated backend needs no provider
    assert compose["services"]["backend"]["environment"]["LLAMA_API_KEY"] == "${LLAMA_API_KEY:-}"
    assert "--requirepass" in compose["services"]["redis"]["command"]


def test_the_example_env_lists_every_variable_without_values() -> None:
    required = set(re.findall(r"\$\{(\w+):\?", COMPOSE.read_text()))
    optional = set(re.findall(r"\$\{(\w+):-", COMPOSE.read_text()))
    example = (ROOT / ".env.example").read_text()
    assert set(re.findall(r"^(\w+)=$", example, re.MULTILINE)) == required
    assert set(re.findall(r"^#(\w+)=", example, re.MULTILINE)) == optional
    assert not re.findall(r"^\w+=.+$", example, re.MULTILINE)


def test_services_have_health_checks_and_wait_for_the_first_start(compose: dict[str, Any]) -> None:
    services = compose["services"]
    assert all("healthcheck" in service for name, service in services.items() if name != "init")
    for name in AIRFLOW_SERVICES:
        assert services[name]["depends_on"]["init"]["condition"] == "service_completed_successfully"
    assert services["init"]["depends_on"]["postgres"]["condition"] == "service_healthy"


def test_triggerers_can_be_scaled(compose: dict[str, Any]) -> None:
    triggerer = compose["services"]["triggerer"]
    assert "container_name" not in triggerer
    assert "ports" not in triggerer


def test_only_authenticated_services_are_published_on_the_loopback(compose: dict[str, Any]) -> None:
    published = {
        name: service["ports"] for name, service in compose["services"].items() if "ports" in service
    }
    assert list(published) == ["api-server", "serve"]
    assert all(port.startswith("127.0.0.1:") for ports in published.values() for port in ports)


def test_the_serve_command_is_valid(compose: dict[str, Any]) -> None:
    program, verb, *options = compose["services"]["serve"]["command"]
    assert (program, verb) == ("router", "serve")
    router = CommandLine({})
    assert router(verb, *options, "--help").code == 0
    assert router(verb, "--no-such-option").code == 2


def test_airflows_commands_and_health_checks_are_valid(
    compose: dict[str, Any],
) -> None:
    commands = []
    for name in AIRFLOW_SERVICES:
        program, *command = compose["services"][name]["command"]
        assert program == "airflow"
        commands.append(command)
        kind, check = compose["services"][name]["healthcheck"]["test"][:2]
        if kind == "CMD-SHELL":
            commands.append(check.replace("'", "").replace('"', "").split()[1:])
    code = [sys.executable, "-c", PARSE_ALL, json.dumps(commands)]
    done = subprocess.run(code, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_backends_command_is_valid(compose: dict[str, Any]) -> None:
    _, _, module, *arguments = compose["services"]["backend"]["command"]
    assert module == "models_backend"
    from models_backend.__main__ import _parser  # noqa: PLC0415 - the module is a program

    arguments[arguments.index("--time-scale") + 1] = "10"
    assert _parser().parse_args(arguments).port == 8100


def test_folders_and_modules_exist_in_the_image(compose: dict[str, Any]) -> None:
    for path in {text for text in texts(compose) if text.startswith("/app/")}:
        assert (ROOT / path.removeprefix("/app/")).is_dir()
    assert compose["services"]["init"]["command"][-1] == "local.first_start"
    assert (ROOT / "local" / "first_start.py").exists()
    assert "chown -R router:router config" in (ROOT / "Dockerfile").read_text(), (
        "the search writes into this folder"
    )
    environment = compose["services"]["scheduler"]["environment"]
    assert {"LLAMA_API_BASE", "LLAMA_API_KEY"} <= environment.keys(), (
        "the search reads the provider's catalog"
    )
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert ".env" in ignored
