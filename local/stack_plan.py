"""Addresses, secrets and commands of a stack's processes."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from local.airflow_environment import ROOT, airflow_environment, clean_environment
from local.keys import Secrets, load_ports, load_secrets, write_private
from local.postgres import PostgresServer, server_options
from local.processes import ProcessSpec
from local.redis import redis_binary

HOST = "127.0.0.1"
PORTS = ("postgres", "redis", "backend", "airflow")
AIRFLOW_PROCESSES = ("api-server", "scheduler", "dag-processor", "triggerer")


@dataclass(frozen=True)
class StackOptions:
    """Options of a stack. `time_scale` divides the latencies of the simulated backend.

    `airflow_settings` are overrides such as `{"CORE__PARALLELISM": "8"}`, `backend_arguments` are arguments
    of `python -m models_backend`, and `postgres_settings` override postgresql.conf.
    """

    time_scale: float = 1.0
    dags_folder: Path = ROOT / "dags"
    plugins_folder: Path = ROOT / "plugins"
    backend_arguments: Sequence[str] = ()
    airflow_settings: Mapping[str, str] = field(default_factory=dict)
    postgres_settings: Mapping[str, str] = field(default_factory=dict)


class Plan:
    """Processes of a stack on one data folder. Creates missing secrets and ports in the folder."""

    def __init__(self, data: Path, options: StackOptions) -> None:
        self._data = data
        self._options = options
        self.secrets: Secrets = load_secrets(data / "secrets.json")
        self.ports = load_ports(data / "ports.json", PORTS)
        self.backend_url = f"http://{HOST}:{self.ports['backend']}"
        self.airflow_url = f"http://{HOST}:{self.ports['airflow']}"
        self.redis_url = f"redis://:{self.secrets.redis}@{HOST}:{self.ports['redis']}/0"
        server = f"{HOST}:{self.ports['postgres']}"
        self.database_url = f"postgresql://router:{self.secrets.postgres}@{server}/router"
        self.metadata_url = f"postgresql+psycopg2://airflow:{self.secrets.postgres}@{server}/airflow"
        self.arrival_log = data / "arrivals.jsonl"
        self.addresses = {
            "ROUTER_DATABASE_URL": self.database_url,
            "ROUTER_REDIS_URL": self.redis_url,
            "MODELS_BACKEND_URL": self.backend_url,
            "ROUTER_AIRFLOW_URL": self.airflow_url,
            "ROUTER_AIRFLOW_USER": "router",
            "ROUTER_AIRFLOW_PASSWORD": self.secrets.router,
        }

    def redis(self) -> ProcessSpec:
        folder = self._data / "redis"
        folder.mkdir(exist_ok=True)
        # Without persistence: the limiter's state is rebuilt from model_calls, which is never stale.
        settings = {
            "port": self.ports["redis"],
            "bind": HOST,
            "dir": f'"{folder}"',
            "save": '""',
            "appendonly": "no",
            "daemonize": "no",
            "requirepass": self.secrets.redis,
        }
        write_private(folder / "redis.conf", "\n".join(f"{name} {value}" for name, value in settings.items()))
        command = [str(redis_binary()), str(folder / "redis.conf")]
        return ProcessSpec("redis", command, clean_environment(), linger_seconds=5, again_seconds=30)

    def postgres(self, server: PostgresServer) -> ProcessSpec:
        port = str(self.ports["postgres"])
        settings = {"listen_addresses": HOST, "port": port, **self._options.postgres_settings}
        command = [str(server.binaries / "postgres"), "-D", str(server.data_folder)]
        for name, value in server_options(server, settings).items():
            command += ["-c", f"{name}={value}"]
        return ProcessSpec(
            "postgres",
            command,
            clean_environment(),
            Path("/"),
            stop_signal="INT",  # fast shutdown: ends connections, loses no data
            again_seconds=30,
            kill_seconds=20,
            linger_seconds=5,
            identity=server.identity,
        )

    def backend(self) -> ProcessSpec:
        command = [
            *(sys.executable, "-m", "models_backend"),
            *("--host", HOST, "--port", str(self.ports["backend"])),
            *("--time-scale", str(self._options.time_scale)),
            *("--arrival-log", str(self.arrival_log)),
            *self._options.backend_arguments,
        ]
        return ProcessSpec("backend", command, clean_environment(), ROOT)

    def router(self, name: str, *arguments: str) -> ProcessSpec:
        """Returns the process `router <arguments>`."""
        command = [sys.executable, "-m", "router.cli", *arguments]
        return ProcessSpec(name, command, {**clean_environment(), **self.addresses}, ROOT)

    def airflow(self, name: str, *arguments: str) -> ProcessSpec:
        """Returns the process `airflow <arguments>`."""
        again = (
            1.0 if name == "triggerer" else 30.0
        )  # a triggerer stops immediately only at the second signal
        command = [sys.executable, "-m", "airflow", *arguments]
        return ProcessSpec(name, command, self._airflow_environment, again_seconds=again)

    def airflow_processes(self) -> list[ProcessSpec]:
        """Returns Airflow's four processes, without log servers, which would listen on every address.

        The api-server reads the logs from the folder instead.
        """
        arguments = {"scheduler": ["--skip-serve-logs"], "triggerer": ["--skip-serve-logs"]}
        return [self.airflow(name, name, *arguments.get(name, [])) for name in AIRFLOW_PROCESSES]

    @cached_property
    def _airflow_environment(self) -> dict[str, str]:
        home = self._data / "airflow"
        home.mkdir(exist_ok=True)
        return airflow_environment(
            home=home,
            metadata_url=self.metadata_url,
            port=self.ports["airflow"],
            secrets=self.secrets,
            dags_folder=self._options.dags_folder.resolve(),
            plugins_folder=self._options.plugins_folder.resolve(),
            addresses=self.addresses,
            settings=self._options.airflow_settings,
        )
