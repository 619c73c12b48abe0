"""The embedded stack: PostgreSQL, Redis, the Models Backend stand-in and Airflow, in one data folder.

    with Stack(Path(".stack"), StackOptions(time_scale=10)) as stack:      # start() and stop()
        stack.database_url, stack.redis_url, stack.backend_url, stack.airflow_url
        stack.addresses          # what router.env holds: ROUTER_DATABASE_URL, ROUTER_AIRFLOW_URL, ...
        stack.passwords          # {"admin": ..., "viewer": ..., "router": ...}: Airflow's users
        stack.arrival_log        # the backend's arrival log, JSONL
        stack.api()              # local.airflow_api.AirflowApi, as the service user (or api("admin"))
        stack.check()            # PartDied if a part ended by itself
        stack.part("triggerer")  # local.processes.Part: .pid .running .log .kill() (SIGKILL, as a crash)
        stack.start_again("triggerer")          # after a kill
        stack.add_triggerer("triggerer-2")      # one more, for failover

Parts: postgres, redis, backend, api-server, scheduler, dag-processor, triggerer. Every part runs under a
guard (see `local/process_guard.py`), so nothing outlives the launcher, not even after its own `kill -9`.
Everything listens on 127.0.0.1 only. A folder serves one stack at a time; two folders, two stacks.
Started again on the same folder, the stack goes on with its data, keys, passwords and (if still free) ports.
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
from local.processes import Part, PartSpec, start_part, stop_parts
from local.redis import redis_answers
from local.stack_plan import Plan, StackOptions
from local.traffic import create_traffic_variables

HEALTH_NAMES = {"scheduler": "scheduler", "dag-processor": "dag_processor", "triggerer": "triggerer"}
START_SECONDS = 180.0
FORMER_STACK_SECONDS = 45.0  # how long the guards of a killed launcher may take to end its parts
SCHEDULER_FIRST_SECONDS = 10.0
LOOK_SECONDS = 0.1
Report = Callable[[str, str], None]


class StackError(RuntimeError):
    """The stack could not be started; the text says which part, and what to do."""


class StopRequested(Exception):  # noqa: N818 - not an error
    """Somebody asked to stop while the stack was still starting."""


class Stack:
    """One stack on one data folder.

    `report(part, what)` is told of each step; once `stop_requested()` is true, `start` raises StopRequested.
    """

    def __init__(
        self,
        data: Path,
        options: StackOptions | None = None,
        *,
        report: Report = lambda _part, _what: None,
        stop_requested: Callable[[], bool] = lambda: False,
    ) -> None:
        self.data = data.resolve()
        self.logs = self.data / "logs"
        self._options = options or StackOptions()
        self._report = report
        self._stop_requested = stop_requested
        self._parts: dict[str, Part] = {}
        self._lock: int | None = None
        self._made: Plan | None = None
        self._server: PostgresServer | None = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> Self:
        """Start everything and wait until it is well; on any failure everything is stopped again."""
        self._own_folder()
        try:
            self._report("stack", f"data in {self.data}")
            self._keep_former_logs()
            self._made = Plan(self.data, self._options)
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
        """Stop everything and wait: the scheduler first, the stores last. Twice is the same as once."""
        stores = [self._parts.pop(name) for name in ("redis", "postgres") if name in self._parts]
        others, self._parts = list(self._parts.values()), {}
        if others or stores:
            self._report("stack", "stopping")
        # An Airflow task that is at work asks the api-server, and waits half a minute for one that is gone.
        for part in others:
            if part.name == "scheduler":
                part.stop_within(SCHEDULER_FIRST_SECONDS)
        stop_parts(others)
        stop_parts(stores)
        if self._server is not None:
            self._server.tidy()
            self._server = None
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def check(self) -> None:
        """PartDied, with the end of its log, if a part ended by itself."""
        for part in self._parts.values():
            if not part.running:
                raise part.death()

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
        """What a `router` in another process needs in its environment."""
        return self._plan.addresses

    @property
    def passwords(self) -> dict[str, str]:
        """Airflow's users and their passwords."""
        return self._plan.secrets.airflow_passwords

    @property
    def arrival_log(self) -> Path:
        return self._plan.arrival_log

    def api(self, user: str = "router") -> AirflowApi:
        """A REST client of this Airflow, logged in as `admin`, `viewer` or the service user `router`."""
        return AirflowApi(self.airflow_url, user, self.passwords[user])

    @property
    def parts(self) -> Mapping[str, Part]:
        return dict(self._parts)

    def part(self, name: str) -> Part:
        return self._parts[name]

    def start_again(self, name: str) -> Part:
        """Start a part that has ended or was killed, as it was; does not wait for its health."""
        former = self._parts[name]
        stop_parts([former])
        return self._run(former.spec)

    def add_triggerer(self, name: str = "triggerer-2") -> Part:
        """One more triggerer beside the first; does not wait for its health."""
        return self._run(replace(self._parts["triggerer"].spec, name=name))

    @property
    def _plan(self) -> Plan:
        if self._made is None:
            raise StackError("The stack was not started yet: call start() first.")
        return self._made

    def _own_folder(self) -> None:
        self.data.mkdir(parents=True, exist_ok=True, mode=0o700)  # its logs may show prompts
        path = self.data / "lock"
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        deadline = time.monotonic() + FORMER_STACK_SECONDS
        while not _locked(lock):
            owner = path.read_text().strip()
            if _lives(owner) or self._stop_requested() or time.monotonic() > deadline:
                os.close(lock)
                advice = "Stop that one, or name another folder."
                raise StackError(f"{self.data} is in use by the stack with process id {owner}. {advice}")
            self._report("stack", f"waiting for what process {owner} left to end")
            time.sleep(1)
        os.ftruncate(lock, 0)
        os.write(lock, f"{os.getpid()}\n".encode())
        self._lock = lock

    def _keep_former_logs(self) -> None:
        for log in self.logs.glob("*.log"):
            log.replace(log.with_suffix(".log.1"))

    def _prepare_server(self) -> PostgresServer:
        return replace(prepare_postgres(self.data / "postgres"), port=self._plan.ports["postgres"])

    def _start_stores(self, server: PostgresServer) -> None:
        self._run(self._plan.postgres(server))
        self._wait({"postgres": lambda: databases.answers(server)})
        databases.prepare(server, self._plan.secrets.postgres)

    def _migrate(self, server: PostgresServer) -> None:
        version = importlib.metadata.version("apache-airflow")
        known = databases.note(server, "airflow") == version
        if not known:
            self._run(self._plan.airflow("migrate-airflow", "db", "migrate"))
        self._run(self._plan.router("migrate-router", "migrate"))
        self._wait_ended("migrate-router")
        if not known:
            self._wait_ended("migrate-airflow")
            databases.set_note(server, "airflow", version)

    def _start_airflow(self) -> None:
        for spec in self._plan.airflow_parts():
            self._run(spec)
        with self.api() as api:
            self._wait(
                {
                    "redis": lambda: redis_answers(self._plan.ports["redis"], self._plan.secrets.redis),
                    "backend": self._backend_answers,
                    "api-server": lambda: bool(api.health()),
                }
            )
            made = create_traffic_variables(api)
            self._wait({name: partial(_well, api, key) for name, key in HEALTH_NAMES.items()})
        if made:
            self._report("stack", f"made {len(made)} traffic Variables from config/models.yaml")

    def _backend_answers(self) -> bool:
        with contextlib.suppress(requests.RequestException), requests.Session() as session:
            session.trust_env = False  # a proxy has no part in this
            return session.get(f"{self.backend_url}/health", timeout=5).ok
        return False

    def _run(self, spec: PartSpec) -> Part:
        keep_open = () if self._lock is None else (self._lock,)
        part = self._parts[spec.name] = start_part(spec, self.logs, keep_open)
        self._report(spec.name, "starting")
        return part

    def _wait(self, checks: Mapping[str, Callable[[], bool]]) -> None:
        left = dict(checks)
        deadline = time.monotonic() + START_SECONDS
        while left:
            self.check()
            for name in [name for name, well in left.items() if well()]:
                del left[name]
                self._report(name, f"ready after {time.monotonic() - self._parts[name].started:.1f} s")
            if left:
                self._pause(deadline, [self._parts[name] for name in left])

    def _wait_ended(self, name: str) -> None:
        part = self._parts[name]
        deadline = time.monotonic() + START_SECONDS
        while part.running:
            self._pause(deadline, [part])
        if part.guard.returncode:
            raise part.death()
        stop_parts([self._parts.pop(name)])
        self._report(name, f"done after {time.monotonic() - part.started:.1f} s")

    def _pause(self, deadline: float, waiting_for: Sequence[Part]) -> None:
        if self._stop_requested():
            raise StopRequested
        if time.monotonic() > deadline:
            complaints = [f"{part.name}: {part.log} ends with:\n{part.log_tail()}" for part in waiting_for]
            raise StackError("\n".join([f"Not ready after {START_SECONDS:.0f} s.", *complaints]))
        time.sleep(LOOK_SECONDS)


def _well(api: AirflowApi, name: str) -> bool:
    return api.health().get(name, False)


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _lives(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        return True
    return True
