"""The embedded stack: PostgreSQL, Redis, the simulated Models Backend and Airflow, in one data folder.

    with Stack(Path(".stack"), StackOptions(time_scale=10)) as stack:      # start() and stop()
        stack.database_url, stack.redis_url, stack.backend_url, stack.airflow_url
        stack.addresses             # contents of router.env: ROUTER_DATABASE_URL, ROUTER_AIRFLOW_URL, ...
        stack.passwords             # {"admin": ..., "viewer": ..., "router": ...}: Airflow's users
        stack.arrival_log           # JSON lines, one per request that arrived at the backend
        stack.api()                 # local.airflow_api.AirflowApi as the service user, or api("admin")
        stack.check()               # raises ProcessDied if a process ended by itself
        stack.supervise()           # or starts it again; call it about every half second
        stack.process("triggerer")  # local.processes.GuardedProcess: .pid .running .log .kill()
        stack.restart("triggerer")           # after a kill
        stack.add_triggerer("triggerer-2")   # for failover

Processes: postgres, redis, backend, api-server, scheduler, dag-processor, triggerer. Each runs under a guard
(see `local/process_guard.py`), so none outlives the launcher, not even after `kill -9`. All listen on
127.0.0.1 only. A folder can be used by one stack at a time. A stack started on an existing folder uses its
data, secrets, passwords and, if they are free, ports.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import requests
from typing_extensions import Self

from local import databases
from local.airflow_api import AirflowApi
from local.keys import as_shell, write_private
from local.postgres import PostgresServer, prepare_postgres
from local.processes import GuardedProcess, ProcessDied, ProcessSpec, start_process, stop_processes
from local.redis import redis_answers
from local.restarts import MAX_DEATHS, WINDOW_SECONDS, RestartPolicy
from local.stack_plan import Plan, StackOptions
from local.traffic import create_traffic_variables

HEALTH_NAMES = {"scheduler": "scheduler", "dag-processor": "dag_processor", "triggerer": "triggerer"}
START_SECONDS = 180.0
FORMER_STACK_SECONDS = 45.0  # time for the guards of a killed launcher to end its processes
SCHEDULER_FIRST_SECONDS = 10.0
POLL_SECONDS = 0.1
Report = Callable[[str, str], None]


class StackError(RuntimeError):
    """The stack could not be started; the text has the cause and what to do."""


class StopRequested(Exception):  # noqa: N818 - not an error
    """A stop was requested while the stack was starting."""


class Stack:
    """A stack on one data folder.

    `report(process, step)` is called for each step. `start` raises StopRequested if `stop_requested()`.
    """

    def __init__(
        self,
        data: Path,
        options: StackOptions | None = None,
        *,
        report: Report = lambda _process, _step: None,
        stop_requested: Callable[[], bool] = lambda: False,
    ) -> None:
        self.data = data.resolve()
        self.logs = self.data / "logs"
        self._options = options or StackOptions()
        self._report = report
        self._stop_requested = stop_requested
        self._processes: dict[str, GuardedProcess] = {}
        self._restarts = RestartPolicy()
        self._restart_at: dict[str, float] = {}
        self._lock: int | None = None
        self._created_plan: Plan | None = None
        self._server: PostgresServer | None = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> Self:
        """Starts all processes and waits until they are healthy. Stops all of them after an error."""
        self._lock_folder()
        try:
            self._report("stack", f"data in {self.data}")
            self._rotate_logs()
            self._created_plan = Plan(self.data, self._options)
            write_private(self.data / "router.env", as_shell(self.addresses))
            self._run(self._plan.redis())
            self._run(self._plan.backend())
            self._server = self._prepare_server()
            self._start_stores(self._server)
            self._migrate(self._server)
            self._start_airflow()
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """Stops all processes and waits: the scheduler first, Redis and Postgres last. Idempotent."""
        stores = [self._processes.pop(name) for name in ("redis", "postgres") if name in self._processes]
        others, self._processes = list(self._processes.values()), {}
        self._restart_at.clear()
        if others or stores:
            self._report("stack", "stopping")
        # A running Airflow task waits half a minute for an api-server that is gone.
        for process in others:
            if process.name == "scheduler":
                process.stop_within(SCHEDULER_FIRST_SECONDS)
        stop_processes(others)
        stop_processes(stores)
        if self._server is not None:
            self._server.remove_socket_folder()
            self._server = None
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def check(self) -> None:
        """Raises ProcessDied with the end of the log if a process ended by itself."""
        for process in self._processes.values():
            if not process.running:
                raise process.death()

    def supervise(self) -> None:
        """Starts processes again that ended by themselves. Raises ProcessDied if one ended too often."""
        now = time.monotonic()
        for name, process in list(self._processes.items()):
            if process.running:
                continue
            if name not in self._restart_at:
                delay = self._restarts.died(name, now)
                if delay is None:
                    often = f"{MAX_DEATHS} times within {WINDOW_SECONDS:.0f} s"
                    raise ProcessDied(f"{name} ended {often} and is not started again. {process.death()}")
                self._restart_at[name] = now + delay
                self._report(name, f"{process.end}, starts again" + (f" in {delay:.0f} s" if delay else ""))
            if now >= self._restart_at[name] and (name == "postgres" or self._postgres_answers()):
                del self._restart_at[name]
                self.restart(name)

    @property
    def database_url(self) -> str:
        return self._plan.database_url

    @property
    def redis_url(self) -> str:
        return self._plan.redis_url

    @property
    def backend_url(self) -> str:
        return self._plan.backend_url

    @property
    def airflow_url(self) -> str:
        return self._plan.airflow_url

    @property
    def addresses(self) -> dict[str, str]:
        """Environment variables for `router` in another process."""
        return self._plan.addresses

    @property
    def passwords(self) -> dict[str, str]:
        """Passwords of Airflow's users."""
        return self._plan.secrets.airflow_passwords

    @property
    def arrival_log(self) -> Path:
        return self._plan.arrival_log

    def api(self, user: str = "router") -> AirflowApi:
        """Returns a REST client of Airflow as `admin`, `viewer` or the service user `router`."""
        return AirflowApi(self.airflow_url, user, self.passwords[user])

    def process(self, name: str) -> GuardedProcess:
        """Returns the process with this name."""
        return self._processes[name]

    def restart(self, name: str) -> GuardedProcess:
        """Starts a process again that has ended; does not wait until it is healthy."""
        former = self._processes[name]
        stop_processes([former])
        return self._run(former.spec)

    def add_triggerer(self, name: str = "triggerer-2") -> GuardedProcess:
        """Starts another triggerer; does not wait until it is healthy."""
        return self._run(replace(self._processes["triggerer"].spec, name=name))

    @property
    def _plan(self) -> Plan:
        if self._created_plan is None:
            raise StackError("The stack is not started. Call start() first.")
        return self._created_plan

    def _lock_folder(self) -> None:
        self.data.mkdir(parents=True, exist_ok=True, mode=0o700)  # logs may contain prompts
        if os.geteuid() == 0:
            self.data.chmod(0o711)  # PostgreSQL runs as another user
        path = self.data / "lock"
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        deadline = time.monotonic() + FORMER_STACK_SECONDS
        while not _locked(lock):
            owner = path.read_text().strip()
            if _is_alive(owner) or self._stop_requested() or time.monotonic() > deadline:
                os.close(lock)
                advice = "Stop it, or use another folder."
                raise StackError(f"{self.data} is in use by the stack with process id {owner}. {advice}")
            self._report("stack", f"waiting until the processes of stack {owner} have ended")
            time.sleep(1)
        os.ftruncate(lock, 0)
        os.write(lock, f"{os.getpid()}\n".encode())
        self._lock = lock

    def _rotate_logs(self) -> None:
        for log in self.logs.glob("*.log"):
            log.replace(log.with_suffix(".log.1"))

    def _prepare_server(self) -> PostgresServer:
        return replace(prepare_postgres(self.data / "postgres"), port=self._plan.ports["postgres"])

    def _start_stores(self, server: PostgresServer) -> None:
        self._run(self._plan.postgres(server))
        self._wait({"postgres": self._postgres_answers})
        databases.prepare(server, self._plan.secrets.postgres)

    def _migrate(self, server: PostgresServer) -> None:
        version = importlib.metadata.version("apache-airflow")
        migrated = databases.comment(server, "airflow") == version
        if not migrated:
            self._run(self._plan.airflow("migrate-airflow", "db", "migrate"))
        self._run(self._plan.router("migrate-router", "migrate"))
        self._wait_ended("migrate-router")
        if not migrated:
            self._wait_ended("migrate-airflow")
            databases.set_comment(server, "airflow", version)

    def _start_airflow(self) -> None:
        for spec in self._plan.airflow_processes():
            self._run(spec)
        with self.api() as api:
            self._wait(
                {
                    "redis": lambda: redis_answers(self._plan.ports["redis"], self._plan.secrets.redis),
                    "backend": self._backend_answers,
                    "api-server": lambda: bool(api.health()),
                }
            )
            created = create_traffic_variables(api)
            self._wait({name: partial(_healthy, api, key) for name, key in HEALTH_NAMES.items()})
        if created:
            self._report("stack", f"created {len(created)} traffic Variables from config/models.yaml")

    def _postgres_answers(self) -> bool:
        return self._server is None or databases.accepts_connections(self._server)

    def _backend_answers(self) -> bool:
        with contextlib.suppress(requests.RequestException), requests.Session() as session:
            session.trust_env = False  # bypass proxies
            return session.get(f"{self.backend_url}/health", timeout=5).ok
        return False

    def _run(self, spec: ProcessSpec) -> GuardedProcess:
        guard_fds = () if self._lock is None else (self._lock,)
        process = self._processes[spec.name] = start_process(spec, self.logs, guard_fds)
        self._report(spec.name, "starting")
        return process

    def _wait(self, checks: Mapping[str, Callable[[], bool]]) -> None:
        pending = dict(checks)
        deadline = time.monotonic() + START_SECONDS
        while pending:
            self.check()
            for name in [name for name, ready in pending.items() if ready()]:
                del pending[name]
                self._report(name, f"ready after {time.monotonic() - self._processes[name].started:.1f} s")
            if pending:
                self._pause(deadline, [self._processes[name] for name in pending])

    def _wait_ended(self, name: str) -> None:
        process = self._processes[name]
        deadline = time.monotonic() + START_SECONDS
        while process.running:
            self._pause(deadline, [process])
        if process.guard.returncode:
            raise process.death()
        stop_processes([self._processes.pop(name)])
        self._report(name, f"done after {time.monotonic() - process.started:.1f} s")

    def _pause(self, deadline: float, waiting_for: Sequence[GuardedProcess]) -> None:
        if self._stop_requested():
            raise StopRequested
        if time.monotonic() > deadline:
            logs = [f"{one.name}: end of {one.log}:\n{one.log_tail()}" for one in waiting_for]
            raise StackError("\n".join([f"Not ready after {START_SECONDS:.0f} s.", *logs]))
        time.sleep(POLL_SECONDS)


def _healthy(api: AirflowApi, name: str) -> bool:
    return api.health().get(name, False)


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        return True
    return True
