"""The console in a browser: viewing, editing a target, asking and retrying."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from selenium.webdriver.common.keys import Keys

from bench.judge import TargetChange
from router.traffic import TrafficTarget
from tests.support.browser import Browser, axe_core, browsing
from tests.support.stack import Solving, say, wait_until

pytestmark = [pytest.mark.airflow, pytest.mark.alone, pytest.mark.timeout(180)]

MAX_BYTES = 300_000
MAX_SECONDS = 1.0
HANG_SECONDS = 6.0
VIEWS = {
    "light": ("models", "queue", "clients", "ranking", "ask", "queue/task"),
    "dark": ("models", "clients", "ask"),
}
EVIL = "<img src=x onerror='window.pwned=1'><script>window.pwned=1</script>"
WORST = {"serious", "critical"}
PHONE = {"width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": True}
SIDE = {"calls": 30, "answered": 30, "worth": 0.8, "score": 0.9, "seconds": 1.5, "cost_usd": 0.0001}
TRIAL = {
    "pairs": 30, "candidate": SIDE, "incumbent": {**SIDE, "worth": 0.7}, "difference": 0.1, "error": 0.02,
    "lower": 0.068,
}  # fmt: skip
NEW_MODEL = {
    "model": "bright-9b", "endpoint": "bright-9b", "max_tokens": 512, "context_tokens": 8192,
    "timeout_seconds": 30, "default_target": "0", "input_price": 0.1, "output_price": 0.1,
}  # fmt: skip


@pytest.fixture
def stalling(solving: Solving) -> Iterator[Any]:
    """Makes calls to a model hang until they time out after HANG_SECONDS."""
    timeouts: dict[str, float] = {}

    def time_out_after(model: str, seconds: float) -> None:
        solving.rows("UPDATE roster SET timeout_seconds = %s WHERE model = %s", seconds, model)
        solving.rows("SELECT nextval('roster_version')")

    def hang(model: str) -> None:
        timeouts[model] = solving.value("SELECT timeout_seconds FROM roster WHERE model = %s", model)
        time_out_after(model, HANG_SECONDS)
        order = {"kind": "hang", "model": model, "share": 1, "seconds": 60}
        requests.post(f"{solving.stack.backend_url}/faults", json=order, timeout=5).raise_for_status()

    yield hang
    requests.delete(f"{solving.stack.backend_url}/faults", timeout=5).raise_for_status()
    for model, seconds in timeouts.items():
        time_out_after(model, seconds)


def console(browser: Browser, view: str) -> None:
    browser.open(f"/router/page#{view}")
    browser.until(lambda: browser.text("#pulse") == "live", "live")


def cell(browser: Browser, model: str, label: str) -> str:
    return browser.text(f'[id="model-{model}"] [data-label="{label}"]')


def test_the_console_opens_from_airflows_navigation_and_updates(solving: Solving, admin: Browser) -> None:
    admin.open("/plugin/router")
    frame = admin.find("iframe")
    admin.driver.switch_to.frame(frame)
    admin.until_text("models active")
    solving.insert(300)
    model = solving.models[0]
    before = cell(admin, model, "Usage")
    admin.until(lambda: cell(admin, model, "Usage") != before, "the usage changes")
    admin.until_text("tasks/min", ".summary")
    unsolved = admin.text(".summary")
    admin.until(lambda: admin.text(".summary") != unsolved, "the summary changes")
    admin.show("models")
    admin.driver.switch_to.default_content()


@pytest.mark.soak
def test_the_page_is_small_and_loads_fast(solving: Solving, admin: Browser) -> None:
    console(admin, "models")
    load, size = admin.run(
        "const page = performance.getEntriesByType('navigation');"
        "const parts = performance.getEntriesByType('resource').filter((e) => !e.name.includes('/api/'));"
        "return [page[0].loadEventEnd / 1000,"
        " [...page, ...parts].reduce((sum, e) => sum + e.decodedBodySize, 0)];"
    )
    say(f"the page: {load:.2f} s, {size:,} bytes")
    assert size < MAX_BYTES
    assert load < MAX_SECONDS * 3, "even on a busy machine"


def test_clients_show_backlog_usage_and_shares(solving: Solving, admin: Browser) -> None:
    solving.rows(
        "INSERT INTO tasks (prompt, client) SELECT 'p', 'team-' || n %% 2 FROM generate_series(1, 400) AS n"
    )
    console(admin, "clients")
    admin.until_text("team-1", "tbody")
    row = "//tr[th='team-1']"
    labels = {
        cell.get_attribute("data-label"): cell.text
        for cell in admin.driver.find_elements("xpath", f"{row}/td")
    }
    assert labels["Limits"] == "no limit"
    assert labels["Share of claims"].endswith("weight 1")
    admin.until(lambda: solving.unsolved() == 0, "all solved")
    calls = f"{row}/td[@data-label='Calls, 24 h']"
    admin.until(lambda: admin.driver.find_element("xpath", calls).text == "200", "the calls of team-1")


def test_editing_a_target_changes_the_traffic(solving: Solving, admin: Browser) -> None:
    model = solving.models[0]
    solving.insert(600)
    solving.until_all_send(time.monotonic())
    console(admin, f"models/{model}")
    admin.click(f'[id="model-{model}"] button')
    field = admin.find(f'[id="target-{model}"]')
    field.send_keys(Keys.CONTROL, "a")
    field.send_keys("1/parsec", Keys.ENTER)
    admin.until_text("'parsec' is not a unit of time", "p.error")
    assert field.get_attribute("aria-invalid") == "true"
    field.send_keys(Keys.CONTROL, "a")
    field.send_keys("30/min", Keys.ENTER)
    saved = time.monotonic()
    solving.changes.append(TargetChange(saved, model, TrafficTarget.parse("30/min")))
    admin.until_text("of 30/min", f'[id="model-{model}"]', 5)
    say(f"saved -> shown: {time.monotonic() - saved:.2f} s")
    admin.until_text("set by admin", f'[id="model-{model}"]')
    assert solving.api.call("GET", f"/variables/traffic.{model}")["value"] == "30/min"
    wait_until(lambda: time.monotonic() > saved + 4, 6, "some seconds of the new target")
    assert len(solving.arrived(saved + 1.5, model)) <= 2, "the old target was used"
    admin.show("target")


@pytest.mark.soak
def test_asking_while_the_preferred_model_hangs(solving: Solving, admin: Browser, stalling: Any) -> None:
    preferred = solving.value("SELECT model FROM rankings WHERE category = 'general' ORDER BY place LIMIT 1")
    stalling(preferred)
    console(admin, "ask")
    admin.find("#prompt").send_keys(f"What is this? {EVIL}")
    admin.find("#category").send_keys("general")
    admin.find("#deadline").send_keys("3")
    admin.find("#prompt").send_keys(Keys.CONTROL, Keys.ENTER)
    admin.until_text(preferred, ".lanes")
    admin.until_text("preferred", ".lanes")
    admin.until_text("in flight", ".lanes")
    admin.until(lambda: admin.all(".answer"), "an answer")
    assert "Provisional answer" in admin.text(".answer h2")
    assert EVIL in admin.text(".answer .text"), "shown as text"
    assert admin.run("return window.pwned ?? null") is None
    admin.show("ask")
    task = admin.find(".answer a").text
    admin.click(".answer a")
    admin.until_text("Calls", "h3")
    assert task.capitalize() in admin.text("h2")
    assert EVIL in admin.text(".text")
    assert admin.run("return window.pwned ?? null") is None
    assert admin.all("main img, main script") == []


def test_a_failed_task_is_retried(solving: Solving, admin: Browser) -> None:
    solving.rows(f"INSERT INTO tasks (prompt, status, failure) VALUES ('Why?', 'failed', $${EVIL}$$)")
    console(admin, "queue")
    admin.until_text(EVIL, "[aria-label=Failures]")
    admin.show("queue")
    assert admin.run("return window.pwned ?? null") is None
    admin.click("[aria-label=Failures] td button")
    admin.until_text("1 requeued", "[aria-label=Failures]")
    wait_until(lambda: solving.unsolved() == 0, 30, "solved")
    admin.until_text("answered", "[aria-label='Recent calls']")


def test_a_viewer_sees_everything_and_can_change_nothing(solving: Solving, tmp_path: Path) -> None:
    with browsing(solving.stack.airflow_url, tmp_path) as viewer:
        viewer.log_in("viewer", solving.stack.passwords["viewer"])
        console(viewer, "models")
        viewer.until_text(solving.models[0])
        assert "Edit" not in viewer.text("main")
        console(viewer, "ask")
        viewer.until_text("Read-only")
        status = viewer.run_async(
            "const done = arguments[0];"
            "fetch('api/traffic/phi-4', {method: 'PUT', body: JSON.stringify({target: '1/s'}),"
            " headers: {'Content-Type': 'application/json', 'X-Router-Console': '1'}})"
            ".then((r) => done(r.status));"
        )
        assert status == 403


@pytest.mark.soak
def test_stale_data_is_marked(solving: Solving, admin: Browser) -> None:
    console(admin, "models")
    admin.driver.set_network_conditions(offline=True, latency=0, throughput=0)
    try:
        admin.until_text("stale", "#pulse")
    finally:
        admin.driver.delete_network_conditions()
    admin.until_text("live", "#pulse")


@pytest.mark.soak
def test_discovery_is_shown_also_on_a_phone(
    solving: Solving, admin: Browser, searched: Callable[[], None]
) -> None:
    console(admin, "ranking")
    admin.until_text("No search has run yet", "[aria-label=Candidates]")
    assert "No model is on probation." in admin.text("[aria-label='On probation']")
    assert "No search has changed the roster yet." in admin.text("[aria-label='Roster changes by searches']")
    searched()
    admin.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", PHONE)
    try:
        console(admin, "ranking")
        admin.until_text("bright-9b", "[aria-label='On probation']")
        assert "30 of 40 required calls" in admin.text("[aria-label='On probation'] article")
        assert f"better than others {EVIL}" in admin.text("[aria-label='On probation'] article")
        assert "utility 0.800 against 0.700" in admin.text("[aria-label='On probation'] article")
        general = admin.text("[aria-label='Candidates: general']")
        assert "1 admitted, 1 not better, 1 ineligible." in general
        assert "+0.100 \N{PLUS-MINUS SIGN} 0.020" in general
        assert admin.run("return window.pwned ?? null") is None
        assert admin.all("main img, main script") == []
        wider = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
        assert admin.run(wider) <= 0, "the page itself must not scroll sideways"
        admin.run("document.querySelector('[aria-label=\"On probation\"]').scrollIntoView()")
        admin.show("search-phone")
    finally:
        admin.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    admin.show("search")


@pytest.fixture
def searched(solving: Solving) -> Iterator[Callable[[], None]]:
    """A search that admitted one model and rejected others; undone afterwards."""

    def run() -> None:
        search = solving.value("INSERT INTO searches (by, ended_at) VALUES ('night', now()) RETURNING search")
        for model, verdict, trial in (
            ("bright-9b", "taken", TRIAL), ("dull-9b", "lost", TRIAL), (EVIL, "refused", None)
        ):  # fmt: skip
            solving.rows(
                "SELECT record_candidate(%s, %s, 'general', 'mock', %s, %s, %s::jsonb)",
                search, model, verdict, f"because {EVIL}", trial and json.dumps(trial),
            )  # fmt: skip
        solving.rows(
            "SELECT admit_candidate(%s, 'night', %s::jsonb, 'general', 0.01, %s, '{}')",
            search, json.dumps(NEW_MODEL), f"better than others {EVIL}",
        )  # fmt: skip

    yield run
    solving.rows("SELECT undo_roster_event(event, 'the test', '{}') FROM roster_events WHERE what = 'taken'")
    solving.rows("TRUNCATE searches, candidates, roster_events")


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.soak
def test_axe_finds_no_serious_violation(solving: Solving, admin: Browser, axe: str, theme: str) -> None:
    task = solving.value("SELECT max(id) FROM tasks")
    for view in VIEWS[theme]:
        admin.run("localStorage.setItem('theme', arguments[0])", theme)
        console(admin, view.replace("task", f"task/{task}"))
        admin.until(lambda: admin.all("main tr, main form, main dl"), "its content")
        if view == "models":
            admin.click("main button")
        admin.run(axe)
        found = admin.run_async("const done = arguments[0]; axe.run().then((r) => done(r.violations));")
        violations = [(f["id"], f["nodes"][0]["html"]) for f in found if f["impact"] in WORST]
        assert violations == [], view


@pytest.fixture(scope="module")
def axe(tmp_path_factory: pytest.TempPathFactory) -> str:
    return axe_core(tmp_path_factory.mktemp("axe"))
