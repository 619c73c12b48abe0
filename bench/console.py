"""What the console costs, and how soon it answers, with many models, a million tasks and ten people who look.

    python -m bench.console [--json FILE]

Starts the embedded stack in a folder of its own, with 50 models and 1,000,000 tasks. Calls and failures go on
coming while it measures. Ten people look at different views, asking what the page asks, when it asks it.

Measured are

- the answers' times by route, of what they ask and of a probe that asks every route beside them;
- the api-server's share of a core, and PostgreSQL's, against that while nobody looks;
- seconds from a change in the database to the line that tells a page of it;
- the page's size and its loading in a headless Chromium, where there is one.

Ends with 1 if a limit is missed. The batch itself is held, so that only the console is measured.
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
from bench.console_fill import Mover, fill, write_models
from bench.console_lookers import OPEN_SECONDS, VIEWS, Looker, Seen, updates, while_looking
from local.stack import Stack
from local.stack_plan import StackOptions
from router.settings import DEFAULT_CONFIG_FOLDER

MOST_ANSWER_SECONDS = 0.1
MOST_CORE = 0.05
MOST_UPDATE_SECONDS = 1.0
MOST_LOAD_SECONDS = 1.0
MOST_BYTES = 300_000
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
    """What was measured. Seconds, bytes, and shares of a core."""

    answers: dict[str, dict[str, float]] = field(default_factory=dict)
    core: dict[str, dict[str, float]] = field(default_factory=dict)
    updates: dict[str, float] = field(default_factory=dict)
    page: dict[str, float] = field(default_factory=dict)
    lines: int = 0
    bytes_a_second: float = 0.0
    wrong: list[str] = field(default_factory=list)

    def missed(self) -> list[str]:
        """The limits that do not hold, in words."""
        missed = [
            f"{route}: p99 {seen['p99'] * 1000:.0f} ms"
            for route, seen in self.answers.items()
            if seen["p99"] > MOST_ANSWER_SECONDS
        ]
        due, late = self.core["api-server"]["due"], self.updates["p99"]
        load, size = self.page.get("load", 0.0), self.page.get("bytes", 0.0)
        checks = {
            f"the api-server takes {due:.1%} of a core for it": due >= MOST_CORE,
            f"updates come after {late:.2f} s (p99)": late > MOST_UPDATE_SECONDS,
            f"the page loads in {load:.2f} s": load > MOST_LOAD_SECONDS,
            f"the page has {size:,.0f} bytes": size > MOST_BYTES,
        }
        return [*missed, *(words for words, is_so in checks.items() if is_so), *self.wrong[:10]]


def main() -> int:
    """0 if all limits hold."""
    options = _arguments()
    out = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    with tempfile.TemporaryDirectory(prefix="router-console-bench-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        figures = _measured(folder, options, out)
    _show(figures, out)
    if options.json:
        options.json.write_text(json.dumps({**asdict(figures), "missed": figures.missed()}, indent=2))
    for words in figures.missed():
        out.print(f"missed: {words}", style="red", markup=False)
    return 1 if figures.missed() else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", type=int, default=50)
    parser.add_argument("--tasks", type=int, default=1_000_000)
    parser.add_argument("--calls", type=int, default=300_000, help="in the log of the last day")
    parser.add_argument("--people", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=60.0, help="of looking")
    parser.add_argument("--probes", type=int, default=100, help="times that every route is asked beside them")
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
        fill(stack.database_url, **about, said=out.print)
        mover = Mover(stack.database_url)
        mover.start()
        try:
            figures = asyncio.run(_looked_at(stack, options, mover, out))
        finally:
            mover.stop()
        figures.page = _loaded(stack, folder, out)
    return figures


async def _looked_at(stack: Stack, options: argparse.Namespace, mover: Mover, out: Console) -> Figures:
    figures, seen, probed = Figures(), Seen(), Seen()
    with stack.api("viewer") as api:
        cookies = {"_token": api.login()}
    base = f"{stack.airflow_url}/router"
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(cookies=cookies, connector=connector) as session:
        people = [
            Looker(session, base, VIEWS[number % len(VIEWS)], 1 + number, seen)
            for number in range(options.people)
        ]
        await Looker(session, base, "probe", 1, probed).probe(1)  # what is imported and planned once
        await asyncio.sleep(SETTLE_SECONDS)
        before = await _busy(stack, options.seconds / 2)
        out.print("nobody looks: measured")
        during: dict[str, float] = {}
        probed.seconds.clear()

        async def measure() -> None:
            await asyncio.sleep((len(people) + 4) * OPEN_SECONDS)  # their pages are open
            during.update(await _busy(stack, options.seconds))
            out.print(f"{options.people} people look: measured")
            await Looker(session, base, "probe", 1, probed).probe(options.probes)

        began = time.monotonic()
        await while_looking(people, measure, seen.wrong)
        figures.bytes_a_second = seen.bytes / (time.monotonic() - began)
        await asyncio.sleep(SETTLE_SECONDS / 2)
        after = await _busy(stack, options.seconds / 2)
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
    found = updates(mover.changes, seen.failures)
    if not found or mover.broken:
        raise SystemExit(f"Nothing was seen of any change: {mover.broken or 'nobody heard of it'}")
    figures.updates = {"seen": len(found), "p50": _median(found), "p99": p99(found), "most": max(found)}
    figures.lines, figures.wrong = seen.lines, [*seen.wrong, *probed.wrong]
    return figures


async def _busy(stack: Stack, seconds: float) -> dict[str, float]:
    """Each part's share of a core over so many seconds, all its processes together."""
    pids = {name: stack.process(name).pid for name in ("api-server", "postgres", "redis")}
    before = {name: _cpu_seconds(pid) for name, pid in pids.items()}
    began = time.monotonic()
    await asyncio.sleep(seconds)
    took = time.monotonic() - began
    return {name: max(0.0, _cpu_seconds(pid) - before[name]) / took for name, pid in pids.items()}


def _cpu_seconds(pid: int) -> float:
    """What a process has used, with its children, the ended ones included."""
    top = psutil.Process(pid)
    used = sum(top.cpu_times()[:4])
    for child in top.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            used += sum(child.cpu_times()[:2])
    return float(used)


def _loaded(stack: Stack, folder: Path, out: Console) -> dict[str, float]:
    """The page in a browser whose cache is cold, the median of LOADS; {} where there is none."""
    chromium = next(filter(None, map(shutil.which, CHROMIUM)), None)
    driver_program = shutil.which("chromedriver")
    if chromium is None or driver_program is None:
        out.print("The page was not loaded: there is no Chromium with its driver here.", style="yellow")
        return {}
    loads = [_load(stack, folder / f"profile-{number}", chromium, driver_program) for number in range(LOADS)]
    load, live, size = (_median([one[index] for one in loads]) for index in range(3))
    return {"load": load, "live": live, "bytes": size}


def _load(stack: Stack, profile: Path, chromium: str, driver_program: str) -> list[float]:
    from selenium import webdriver  # noqa: PLC0415 - only where there is a browser
    from selenium.webdriver.chrome.service import Service  # noqa: PLC0415 - the same

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=Service(driver_program))
    try:
        with stack.api("viewer") as api:
            token = api.login()
        driver.get(f"{stack.airflow_url}/router/nothing")  # a cookie is set for the page that is open
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
    for name in ("answers", "p50 ms", "p99 ms", "most ms"):
        table.add_column(name, justify="right")
    for route, seen in figures.answers.items():
        times = (f"{seen[name] * 1000:.1f}" for name in ("p50", "p99", "most"))
        table.add_row(route, f"{seen['answers']:,}", *times)
    out.print(table)
    for part, share in figures.core.items():
        beside = f"{share['looking']:.1%} while they look, {share['quiet']:.1%} else"
        out.print(f"{part}: {share['due']:+.1%} of a core ({beside})")
    told: dict[str, Any] = figures.updates
    words = f"{told['seen']:,} updates seen, after {told['p50']:.2f} s (median), {told['p99']:.2f} s (p99)"
    out.print(f"{words}; {figures.lines:,} boards, {figures.bytes_a_second / 1000:.0f} kB/s to all")
    if figures.page:
        load, live, size = (figures.page[name] for name in ("load", "live", "bytes"))
        out.print(f"the page: {size:,.0f} bytes, loaded in {load:.2f} s, live after {live:.2f} s")


if __name__ == "__main__":
    sys.exit(main())
