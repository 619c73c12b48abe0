"""What the demo of learning runs on: one PostgreSQL, two Redis, one stand-in, in a folder that goes with it.

Two sides live through the same days: each has a database and a Redis of its own, and both ask the same
stand-in, so that the weather is the same for both at every moment. Every part runs under a guard, so that
nothing outlives the demo.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
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
LOOK_SECONDS = 0.05
ANSWER_SECONDS = 10.0
FLAWS_AT_ONCE = 10_000
# Nothing of it is kept, so nothing has to be safe on disk.
POSTGRES_SETTINGS = {"listen_addresses": "", "fsync": "off", "full_page_writes": "off"}


class LearningStage:
    """Use it as `with`. `addresses` of a side, the weather, and what the stand-in knows of its answers.

    `backend_arguments` may write files into the folder that it is given.
    """

    def __init__(
        self,
        sides: Sequence[str],
        backend_arguments: Callable[[Path], Sequence[str]],
        *,
        time_scale: float,
        stop_requested: Callable[[], bool] = lambda: False,
    ) -> None:
        self._sides = tuple(sides)
        self._stop_requested = stop_requested
        self.folder = Path(tempfile.mkdtemp(prefix="router-learning-"))
        self._options = StackOptions(
            time_scale=time_scale,
            backend_arguments=backend_arguments(self.folder),
            postgres_settings=POSTGRES_SETTINGS,
        )
        self._parts: list[GuardedProcess] = []
        self._server: PostgresServer | None = None
        self._http = requests.Session()
        self._http.trust_env = False  # a proxy has no part in this
        self._flaws_seen = 0
        self.addresses: dict[str, Addresses] = {}
        self.backend_url = ""

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End every part and take the folder away. Twice is the same as once."""
        parts, self._parts = self._parts, []
        stop_processes(parts)
        if self._server is not None:
            self._server.remove_socket_folder()
            self._server = None
        self._http.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def check(self) -> None:
        """ProcessDied, with the end of its log, if a part ended by itself."""
        for part in self._parts:
            if not part.running:
                raise part.death()

    def set_weather(self, orders: Sequence[Mapping[str, Any]]) -> None:
        """Put this weather in force, and no other. StackError with the stand-in's words if it refuses."""
        url = f"{self.backend_url}/weather"
        response = self._http.put(url, json=list(orders), timeout=ANSWER_SECONDS)
        if not response.ok:
            raise StackError(f"The Models Backend refuses the weather: {response.text[:300]}")

    def new_flaws(self) -> dict[str, str | None]:
        """call_id -> flaw (None: good) of the answers that were given since the last look."""
        found: dict[str, str | None] = {}
        while True:
            asked = {"since": self._flaws_seen, "limit": FLAWS_AT_ONCE}
            response = self._http.get(f"{self.backend_url}/flaws", params=asked, timeout=ANSWER_SECONDS)
            response.raise_for_status()
            page = response.json()
            self._flaws_seen = page["next"]
            if not page["answers"]:
                return found
            found |= {answer["request_id"]: answer["flaw"] for answer in page["answers"]}

    def _start(self) -> None:
        plans = {side: self._start_redis(side) for side in self._sides}
        first = plans[self._sides[0]]
        self.backend_url = first.backend_url
        self._run(first.backend())
        self._server = replace(prepare_postgres(self.folder / "postgres"), port=first.ports["postgres"])
        self._run(first.postgres(self._server))
        server = self._server
        self._wait("postgres", lambda: databases.accepts_connections(server))
        for side, plan in plans.items():
            url = server.create_database(side)
            migrate(url)
            self.addresses[side] = Addresses(
                database_url=url, redis_url=plan.redis_url, backend_url=self.backend_url
            )
        self._wait("redis", lambda: all(_redis_answers(plan) for plan in plans.values()))
        self._wait("backend", self._backend_answers)

    def _start_redis(self, side: str) -> Plan:
        """A plan of its own for each side: its Redis is all that is taken from most of them."""
        folder = self.folder / side
        folder.mkdir(mode=0o755)
        plan = Plan(folder, self._options)
        self._run(replace(plan.redis(), name=f"redis-{side}"))
        return plan

    def _run(self, spec: ProcessSpec) -> None:
        self._parts.append(start_process(spec, self.folder / "logs"))

    def _wait(self, name: str, well: Callable[[], bool]) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not well():
            self.check()
            if self._stop_requested():
                raise StopRequested
            if time.monotonic() > deadline:
                raise StackError(f"{name} did not answer within {START_SECONDS:g} s.")
            time.sleep(LOOK_SECONDS)

    def _backend_answers(self) -> bool:
        with contextlib.suppress(requests.RequestException):
            return self._http.get(f"{self.backend_url}/health", timeout=ANSWER_SECONDS).ok
        return False


def _redis_answers(plan: Plan) -> bool:
    return redis_answers(plan.ports["redis"], plan.secrets.redis)
