"""One PostgreSQL, one Redis per side and one stand-in, in a temporary folder; all run under guards."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import requests
from typing_extensions import Self

from local import databases
from local.postgres import PostgresServer, prepare_postgres
from local.processes import GuardedProcess, ProcessSpec, start_process, stop_processes
from local.redis import redis_answers
from local.stack import StackError, StopRequested
from local.stack_plan import Plan, StackOptions
from router.migrations import migrate
from router.settings import Addresses

START_SECONDS = 60.0
POLL_SECONDS = 0.05
REPLY_SECONDS = 10.0
FLAWS_PER_PAGE = 10_000
# Nothing is kept, so nothing has to survive a crash.
POSTGRES_SETTINGS = {"listen_addresses": "", "fsync": "off", "full_page_writes": "off"}


class Services:
    """To be used as `with`; `addresses` by side. Both sides call the same stand-in."""

    def __init__(self, sides: Sequence[str], stop_requested: Callable[[], bool]) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="router-learning-"))
        self.addresses: dict[str, Addresses] = {}
        self._sides = sides
        self._stop_requested = stop_requested
        self._processes: list[GuardedProcess] = []
        self._postgres: PostgresServer | None = None
        self._http = requests.Session()
        self._http.trust_env = False
        self._next_flaw = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        stop_processes(self._processes)
        if self._postgres is not None:
            self._postgres.remove_socket_folder()
        self._http.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def start(self, backend_arguments: Sequence[str], time_scale: float) -> None:
        """Start everything. Raises StackError if a part does not answer, StopRequested if asked to stop."""
        options = StackOptions(
            time_scale=time_scale, backend_arguments=backend_arguments, postgres_settings=POSTGRES_SETTINGS
        )
        plans = {side: self._plan(side, options) for side in self._sides}
        first = plans[self._sides[0]]
        self._backend_url = first.backend_url
        self._run(first.backend())
        server = replace(prepare_postgres(self.folder / "postgres"), port=first.ports["postgres"])
        self._postgres = server
        self._run(first.postgres(server))
        self._wait("PostgreSQL", lambda: databases.accepts_connections(server))
        for side, plan in plans.items():
            url = server.create_database(side)
            migrate(url)
            self.addresses[side] = Addresses(
                database_url=url, redis_url=plan.redis_url, backend_url=first.backend_url
            )
            self._wait("Redis", partial(redis_answers, plan.ports["redis"], plan.secrets.redis))
        self._wait("the Models Backend", self._backend_answers)

    def check(self) -> None:
        """Raise ProcessDied, with the end of its log, if a process has ended."""
        for process in self._processes:
            if not process.running:
                raise process.death()

    def set_conditions(self, conditions: Sequence[Mapping[str, Any]]) -> None:
        """Replace the stand-in's simulated conditions."""
        url = f"{self._backend_url}/conditions"
        response = self._http.put(url, json=list(conditions), timeout=REPLY_SECONDS)
        if not response.ok:
            raise StackError(f"The Models Backend refused the conditions: {response.text[:300]}")

    def new_flaws(self) -> dict[str, str | None]:
        """call_id -> flaw (None: a good answer) of the answers since the last call."""
        found: dict[str, str | None] = {}
        while True:
            page = {"since": self._next_flaw, "limit": FLAWS_PER_PAGE}
            response = self._http.get(f"{self._backend_url}/flaws", params=page, timeout=REPLY_SECONDS)
            response.raise_for_status()
            self._next_flaw, answers = response.json()["next"], response.json()["answers"]
            if not answers:
                return found
            found |= {answer["request_id"]: answer["flaw"] for answer in answers}

    def _plan(self, side: str, options: StackOptions) -> Plan:
        folder = self.folder / side
        folder.mkdir(mode=0o755)
        plan = Plan(folder, options)
        self._run(replace(plan.redis(), name=f"redis-{side}"))
        return plan

    def _run(self, spec: ProcessSpec) -> None:
        self._processes.append(start_process(spec, self.folder / "logs"))

    def _wait(self, name: str, ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not ready():
            self.check()
            if self._stop_requested():
                raise StopRequested
            if time.monotonic() > deadline:
                raise StackError(f"{name} did not answer within {START_SECONDS:g} s.")
            time.sleep(POLL_SECONDS)

    def _backend_answers(self) -> bool:
        try:
            return self._http.get(f"{self._backend_url}/health", timeout=REPLY_SECONDS).ok
        except requests.RequestException:
            return False
