"""Environment of the embedded Airflow: local only, small, with low scheduling latency."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from local.keys import Secrets, write_private

ROOT = Path(__file__).resolve().parent.parent
REMOVED_PREFIXES = (
    *("AIRFLOW_", "_AIRFLOW_", "PG", "PYTHONDONTWRITEBYTECODE"),
    *("ROUTER_DATABASE_URL", "ROUTER_REDIS_URL", "ROUTER_AIRFLOW_", "MODELS_BACKEND_URL"),
)
USERS = {
    "admin": "admin",
    "viewer": "viewer",
    "router": "op",
}  # `op` is the lowest role that may edit Variables


def clean_environment() -> dict[str, str]:
    """Returns this process's environment without settings of another Airflow, router or Postgres.

    Variables of Airflow are kept: AIRFLOW_VAR_TRAFFIC.<MODEL> sets a target.

    Programs of this Python come first on PATH, and proxies are bypassed for the loopback. Bytecode is written
    even if PYTHONDONTWRITEBYTECODE is set: Airflow's imports take three times as long without it.
    """
    environment = {
        name: value
        for name, value in os.environ.items()
        if name.startswith("AIRFLOW_VAR_") or not name.startswith(REMOVED_PREFIXES)
    }
    environment["PATH"] = os.pathsep.join(
        [str(Path(sys.executable).parent), environment.get("PATH", os.defpath)]
    )
    environment["PYTHONUNBUFFERED"] = "1"
    for name in ("no_proxy", "NO_PROXY"):
        known = environment.get(name)
        environment[name] = ",".join(filter(None, [known, "127.0.0.1,localhost"]))
    if sys.platform == "darwin":
        environment["OBJC_DISABLE_INITIALIZE_FORK_SAFETY"] = "YES"  # Airflow forks
    return environment


def airflow_environment(
    *,
    home: Path,
    metadata_url: str,
    port: int,
    secrets: Secrets,
    dags_folder: Path,
    plugins_folder: Path,
    addresses: Mapping[str, str],
    settings: Mapping[str, str],
) -> dict[str, str]:
    """Returns the environment of Airflow's processes. `settings` are overrides by `SECTION__KEY`."""
    url = f"http://127.0.0.1:{port}"
    passwords_file = home / "passwords.json"
    write_private(passwords_file, json.dumps(secrets.airflow_passwords))
    configured = {
        "CORE__DAGS_FOLDER": str(dags_folder),
        "CORE__PLUGINS_FOLDER": str(plugins_folder),
        "CORE__LOAD_EXAMPLES": "False",
        "CORE__SENSITIVE_VAR_CONN_NAMES": "prompt",  # masks prompts of ask_prompt in the audit log
        "CORE__EXECUTOR": "LocalExecutor",
        "CORE__PARALLELISM": "4",  # all of them are forked at the start
        "CORE__FERNET_KEY": secrets.fernet,
        "CORE__EXECUTION_API_SERVER_URL": f"{url}/execution/",
        "CORE__SIMPLE_AUTH_MANAGER_USERS": ",".join(f"{name}:{role}" for name, role in USERS.items()),
        "CORE__SIMPLE_AUTH_MANAGER_PASSWORDS_FILE": str(passwords_file),
        "DATABASE__SQL_ALCHEMY_CONN": metadata_url,
        "LOGGING__BASE_LOG_FOLDER": str(home / "logs"),
        "API__HOST": "127.0.0.1",
        "API__PORT": str(port),
        "API__BASE_URL": url,
        "API__WORKERS": "1",
        "API__SECRET_KEY": secrets.api,
        "API_AUTH__JWT_SECRET": secrets.jwt,
        "SCHEDULER__SCHEDULER_IDLE_SLEEP_TIME": "0.2",  # bounds the latency of every run and task
        "SCHEDULER__JOB_HEARTBEAT_SEC": "2",
        "SCHEDULER__ENABLE_HEALTH_CHECK": "False",
        "DAG_PROCESSOR__REFRESH_INTERVAL": "5",
        "DAG_PROCESSOR__BUNDLE_REFRESH_CHECK_INTERVAL": "2",
        "DAG_PROCESSOR__PARSING_PROCESSES": "1",
        "TRIGGERER__CAPACITY": "1000",
        "TRIGGERER__JOB_HEARTBEAT_SEC": "2",
        "TRIGGERER__TRIGGERER_HEALTH_CHECK_THRESHOLD": "10",
        "USAGE_DATA_COLLECTION__ENABLED": "False",
        **settings,
    }
    connections = {
        "ROUTER_DB": addresses["ROUTER_DATABASE_URL"],
        "ROUTER_REDIS": addresses["ROUTER_REDIS_URL"],
        "MODELS_BACKEND": addresses["MODELS_BACKEND_URL"],
    }
    return {
        **clean_environment(),
        **{f"AIRFLOW__{name}": value for name, value in configured.items()},
        **{f"AIRFLOW_CONN_{name}": url for name, url in connections.items()},
        "AIRFLOW_HOME": str(home),
        "ROUTER_AIRFLOW_URL": addresses["ROUTER_AIRFLOW_URL"],
        "ROUTER_AIRFLOW_USER": addresses["ROUTER_AIRFLOW_USER"],
        "ROUTER_AIRFLOW_PASSWORD": addresses["ROUTER_AIRFLOW_PASSWORD"],
    }
