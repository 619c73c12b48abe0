"""`python -m local.first_start`: prepares schemas, Airflow's users and traffic Variables.

For deployments other than the embedded stack (docker-compose.yaml), before Airflow starts. Reads the
environment of Airflow and `router`, and AIRFLOW_ADMIN_PASSWORD, AIRFLOW_VIEWER_PASSWORD and
ROUTER_AIRFLOW_PASSWORD. With ADMIN_DATABASE_URL, of a superuser, it first gives each service a role of its
own, and reads ROUTER_OWNER_PASSWORD, ROUTER_APP_PASSWORD and AIRFLOW_DB_PASSWORD. Safe to run again: it
upgrades schemas and leaves existing Variables unchanged.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path

from local import roles
from local.keys import write_private
from local.traffic import traffic_variables
from router.errors import ConfigError, RouterError, printable

PASSWORDS_FILE = "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_PASSWORDS_FILE"
PASSWORDS = {
    "admin": "AIRFLOW_ADMIN_PASSWORD",
    "viewer": "AIRFLOW_VIEWER_PASSWORD",
    "router": "ROUTER_AIRFLOW_PASSWORD",
}


def main() -> int:
    """Returns the exit status; errors are printed."""
    try:
        write_passwords(os.environ)
        has_roles = _prepare_roles(os.environ)
        _run("airflow", "db", "migrate")
        _run("router.cli", "migrate", *["--roles"] * has_roles)
        _import_variables()
    except RouterError as error:
        print(printable(error), file=sys.stderr)
        return 1
    except subprocess.CalledProcessError as error:
        return error.returncode
    return 0


def _prepare_roles(environment: Mapping[str, str]) -> bool:
    """Returns whether the services have roles of their own."""
    administrator = environment.get(roles.ADMINISTRATOR)
    if not administrator:
        return False
    _require(environment, roles.PASSWORDS.values())
    passwords = {role: environment[name] for role, name in roles.PASSWORDS.items()}
    roles.prepare_roles(administrator, passwords)
    return True


def _require(environment: Mapping[str, str], names: Iterable[str]) -> None:
    missing = [name for name in names if not environment.get(name)]
    if missing:
        raise ConfigError(f"{', '.join(missing)}: not set. Set them in the environment (see .env.example).")


def write_passwords(environment: Mapping[str, str]) -> None:
    """Writes the password file of Airflow's simple auth manager. Raises ConfigError for unset variables."""
    _require(environment, (PASSWORDS_FILE, *PASSWORDS.values()))
    passwords = {user: environment[name] for user, name in PASSWORDS.items()}
    write_private(Path(environment[PASSWORDS_FILE]), json.dumps(passwords))


def _import_variables() -> None:
    entries = {variable.key: asdict(variable) for variable in traffic_variables()}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "variables.json"
        file.write_text(json.dumps(entries))
        _run("airflow", "variables", "import", "--action-on-existing-key", "skip", str(file))


def _run(module: str, *arguments: str) -> None:
    subprocess.run([sys.executable, "-m", module, *arguments], check=True)


if __name__ == "__main__":
    sys.exit(main())
