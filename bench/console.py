"""Measures the console's load and response times with 50 models, a million tasks and ten clients.

    python -m bench.console [--json FILE]

Starts an embedded stack and fills its database; calls and failures are added while it measures. Ten clients
send the requests of the console's views at the page's intervals. Measures:

- response times by route, of the clients and of a probe that requests every route;
- CPU use of api-server, PostgreSQL and Redis in cores, compared with the time without clients;
- seconds from a change in the database to the update that clients receive;
- size and load time of the page in headless Chromium, if it is installed.

The exit status is 1 if a limit is exceeded. The batch is paused, so that only the console is measured.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import psutil
from rich.console import Console
from rich.table import Table

from bench.answering_report import p99
from bench.console_clients import OPEN_SECONDS, VIEWS, Client, Observations, update_delays, while_connected
from bench.console_fill import Mover, fill, write_models
from local.stack import Stack
from local.stack_plan import StackOptions
from router.settings import DEFAULT_CONFIG_FOLDER

MAX_RESPONSE_SECONDS = 0.1
MAX_CORES = 0.05
MAX_UPDATE_SECONDS = 1.0
MAX_LOAD_SECONDS = 1.0
MAX_BYTES = 300_000
LOADS = 5
SETTLE_SECONDS = 20.0
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-proxy-server")
LOADED = """
const done = arguments[0];
const look = () => {
  const page = performance.getEntriesByType('navigation')[0];
  const live = document.getElementById('pulse')?.dataset.state === 'live';
  if (!page?.loadEventEnd || !live) { setTimeout(look, 5); return; }
  const parts = performance.getEntriesByType('resource').filter((e) => !e.name.includes('/api/'));
  done([page.loadEventEnd / 1000, performance.now() / 1000,
        [page, ...parts].reduce((sum, e) => sum + e.decodedBodySize, 0)]);
};
look();
"""


@dataclass
class Figures:
    """Measurements in seconds, bytes, and cores."""

    answers: dict[str, dict[str, float]] = field(default_factory=dict)
    core: dict[str, dict[str, float]] = field(default_factory=dict)
    updates: dict[str, float] = field(default_factory=dict)
    page: dict[str, float] = field(default_factory=dict)
    lines: int = 0
    bytes_a_second: float = 0.0
    wrong: list[str] = field(default_factory=list)

    def missed(self) -> list[str]:
        """Returns the exceeded limits."""
        missed = [
            f"{route}: p99 {seen['p99'] * 1000:.0f} ms"
            for route, seen in self.answers.items()
            if seen["p99"] > MAX_RESPONSE_SECONDS
        ]
        due, late = self.core["api-server"]["due"], self.updates["p99"]
        load, size = self.page.get("load", 0.0), self.page.get("bytes", 0.0)
        checks = {
            f"the clients cost {due:.1%} of a core in the api-server": due >= MAX_CORES,
            f"updates arrive after {late:.2f} s (p99)": late > MAX_UPDATE_SECONDS,
            f"the page loads in {load:.2f} s": load > MAX_LOAD_SECONDS,
            f"the page has {size:,.0f} bytes": size > MAX_BYTES,
        }
        return [*missed, *(text for text, exceeded in checks.items() if exceeded), *self.wrong[:10]]


def main() -> int:
    """Returns 0 if all limits are kept, otherwise 1."""
    options = _arguments()
    out = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    with tempfile.TemporaryDirectory(prefix="router-console-bench-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        figures = _measured(folder, options, out)
    _show(figures, out)
    if options.json:
        options.json.write_text(json.dumps({**asdict(figures), "missed": figures.missed()}, indent=2))
    for text in figures.missed():
        out.print(f"exceeded: {text}", style="red", markup=False)
    return 1 if figures.missed() else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", type=int, default=50)
    parser.add_argument("--tasks", type=int, default=1_000_000)
    parser.add_argument("--calls", type=int, default=300_000, help="calls in the log of the last day")
    parser.add_argument("--people", type=int, default=10, help="number of clients")
    parser.add_argument("--seconds", type=float, default=60.0, help="duration of the measurement")
    parser.add_argument("--probes", type=int, default=100, help="requests of the probe per route")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args()


def _measured(folder: Path, options: argparse.Namespace, out: Console) -> Figures:
    config = shutil.copytree(DEFAULT_CONFIG_FOLDER, folder / "config")
    write_models(config, options.models)
    os.environ["ROUTER_CONFIG"] = str(config)
    arguments = ("--models", str(config / "models.yaml"))
    settings = StackOptions(backend_arguments=arguments, postgres_settings={"fsync": "off"})
    stack = Stack(folder / "stack", settings, report=lambda part, what: out.print(f"{part}: {what}"))
    with stack:
        about = {"tasks": options.tasks, "calls": options.calls, "models": options.models}
        fill(stack.database_url, **about, report=out.print)
        mover = Mover(stack.database_url)
        mover.start()
        try:
            figures = asyncio.run(_measure_clients(stack, options, mover, out))
        finally:
            mover.stop()
        figures.page = _loaded(stack, folder, out)
    return figures


async def _measure_clients(stack: Stack, options: argparse.Namespace, mover: Mover, out: Console) -> Figures:
    figures, seen, probed = Figures(), Observations(), Observations()
    with stack.api("viewer") as api:
        cookies = {"_token": api.login()}
    base = f"{stack.airflow_url}/router"
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(cookies=cookies, connector=connector) as session:
        clients = [
            Client(session, base, VIEWS[number % len(VIEWS)], 1 + number, seen)
            for number in range(options.people)
        ]
        await Client(session, base, "probe", 1, probed).probe(1)  # warms up imports and query plans
        await asyncio.sleep(SETTLE_SECONDS)
        before = await _cores_used(stack, options.seconds / 2)
        out.print("measured without clients")
        during: dict[str, float] = {}
        probed.seconds.clear()

        async def measure() -> None:
            await asyncio.sleep((len(clients) + 4) * OPEN_SECONDS)  # all pages are open
            during.update(await _cores_used(stack, options.seconds))
            out.print(f"measured with {options.people} clients")
            await Client(session, base, "probe", 1, probed).probe(options.probes)

        began = time.monotonic()
        await while_connected(clients, measure, seen.wrong)
        figures.bytes_a_second = seen.bytes / (time.monotonic() - began)
        await asyncio.sleep(SETTLE_SECONDS / 2)
        after = await _cores_used(stack, options.seconds / 2)
    for route in sorted(seen.seconds.keys() | probed.seconds.keys()):
        both = seen.seconds.get(route, []) + probed.seconds.get(route, [])
        figures.answers[route] = {
            "answers": len(both),
            "p50": _median(both),
            "p99": p99(both),
            "most": max(both),
        }
    for part, share in during.items():
        quiet = (before[part] + after[part]) / 2
        figures.core[part] = {"looking": share, "quiet": quiet, "due": share - quiet}
    delays = update_delays(mover.changes, seen.failures)
    if not delays or mover.broken:
        raise SystemExit(f"No client received an update: {mover.broken or 'no error'}")
    figures.updates = {"seen": len(delays), "p50": _median(delays), "p99": p99(delays), "most": max(delays)}
    figures.lines, figures.wrong = seen.lines, [*seen.wrong, *probed.wrong]
    return figures


async def _cores_used(stack: Stack, seconds: float) -> dict[str, float]:
    """Returns the cores that each service uses over `seconds`, with its child processes."""
    pids = {name: stack.process(name).pid for name in ("api-server", "postgres", "redis")}
    before = {name: _cpu_seconds(pid) for name, pid in pids.items()}
    began = time.monotonic()
    await asyncio.sleep(seconds)
    took = time.monotonic() - began
    return {name: max(0.0, _cpu_seconds(pid) - before[name]) / took for name, pid in pids.items()}


def _cpu_seconds(pid: int) -> float:
    """Returns the CPU time of a process and its children, including ended ones."""
    top = psutil.Process(pid)
    used = sum(top.cpu_times()[:4])
    for child in top.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            used += sum(child.cpu_times()[:2])
    return float(used)


def _loaded(stack: Stack, folder: Path, out: Console) -> dict[str, float]:
    """Returns the median of LOADS page loads with a cold cache; {} without Chromium."""
    chromium = next(filter(None, map(shutil.which, CHROMIUM)), None)
    driver_program = shutil.which("chromedriver")
    if chromium is None or driver_program is None:
        out.print("Page load was not measured: Chromium or its driver is missing.", style="yellow")
        return {}
    loads = [_load(stack, folder / f"profile-{number}", chromium, driver_program) for number in range(LOADS)]
    load, live, size = (_median([one[index] for one in loads]) for index in range(3))
    return {"load": load, "live": live, "bytes": size}


def _load(stack: Stack, profile: Path, chromium: str, driver_program: str) -> list[float]:
    from selenium import webdriver  # noqa: PLC0415 - needed with a browser only
    from selenium.webdriver.chrome.service import Service  # noqa: PLC0415 - as above

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=Service(driver_program))
    try:
        with stack.api("viewer") as api:
            token = api.login()
        driver.get(f"{stack.airflow_url}/router/nothing")  # cookies can be set for the open page only
        driver.add_cookie({"name": "_token", "value": token, "path": "/"})
        driver.get(f"{stack.airflow_url}/router/page")
        found: list[float] = driver.execute_async_script(LOADED)
        return found
    finally:
        driver.quit()


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2] if values else 0.0


def _show(figures: Figures, out: Console) -> None:
    table = Table("route", box=None)
    for name in ("responses", "p50 ms", "p99 ms", "max ms"):
        table.add_column(name, justify="right")
    for route, seen in figures.answers.items():
        times = (f"{seen[name] * 1000:.1f}" for name in ("p50", "p99", "most"))
        table.add_row(route, f"{seen['answers']:,}", *times)
    out.print(table)
    for part, share in figures.core.items():
        details = f"{share['looking']:.1%} with clients, {share['quiet']:.1%} without"
        out.print(f"{part}: {share['due']:+.1%} of a core ({details})")
    delays: dict[str, Any] = figures.updates
    text = f"{delays['seen']:,} updates after {delays['p50']:.2f} s (median), {delays['p99']:.2f} s (p99)"
    out.print(f"{text}; {figures.lines:,} status lines, {figures.bytes_a_second / 1000:.0f} kB/s in total")
    if figures.page:
        load, live, size = (figures.page[name] for name in ("load", "live", "bytes"))
        out.print(f"page: {size:,.0f} bytes, loaded in {load:.2f} s, live after {live:.2f} s")


if __name__ == "__main__":
    sys.exit(main())
