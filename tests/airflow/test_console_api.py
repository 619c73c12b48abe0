"""The console's API in Airflow's api-server: permissions, rejected requests and responses."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import requests

from bench.judge import TargetChange
from router.traffic import TrafficTarget
from tests.support.command_line import CommandLine
from tests.support.stack import Solving, wait_for, wait_until

pytestmark = [pytest.mark.airflow, pytest.mark.alone, pytest.mark.timeout(180)]

FILLED = {"model": "phi-4", "task_id": "1", "anything:path": "nothing-here"}
WRITE = {"X-Router-Console": "1"}
STREAM_SECONDS = 3.0
KEY = "traffic.phi-4"


class Client:
    """A user's browser: it sends the login cookie and the given headers."""

    def __init__(self, solving: Solving, user: str | None) -> None:
        self.base = f"{solving.stack.airflow_url}/router"
        self.session = requests.Session()
        self.session.trust_env = False
        if user is not None:
            body = {"username": user, "password": solving.stack.passwords[user]}
            token = self.session.post(f"{solving.stack.airflow_url}/auth/token", json=body, timeout=10).json()
            self.session.cookies.set("_token", token["access_token"])

    def __call__(self, method: str, path: str, **more: Any) -> requests.Response:
        return self.session.request(method, f"{self.base}{path}", timeout=20, **more)

    def routes(self) -> list[tuple[str, str]]:
        """Returns every method of every route, with values for its parameters."""
        found = []
        for route in self("GET", "/api").json()["routes"]:
            path = route["path"]
            for name, value in FILLED.items():
                path = path.replace("{" + name + "}", value)
            found += [(method, path) for method in route["methods"]]
        return found


@pytest.fixture(scope="module")
def admin(solving_stack: Solving) -> Iterator[Client]:
    client = Client(solving_stack, "admin")
    yield client
    client.session.close()


@pytest.fixture(scope="module")
def viewer(solving_stack: Solving) -> Iterator[Client]:
    client = Client(solving_stack, "viewer")
    yield client
    client.session.close()


def test_every_route_requires_a_login(solving_stack: Solving, admin: Client) -> None:
    routes = admin.routes()
    assert len(routes) > 20
    assert {"/page", "/console.js", "/console.css"} <= {path for _, path in routes}
    anonymous, forged = Client(solving_stack, None), Client(solving_stack, None)
    forged.session.cookies.set("_token", "eyJhbGciOiJub25lIn0.eyJzdWIiOiJhZG1pbiJ9.")
    for method, path in routes:
        answer = anonymous(method, path, headers=WRITE, json={"target": "1/s"} if method != "GET" else None)
        assert answer.status_code == 401, (method, path)
        assert forged(method, path, headers=WRITE).status_code in {401, 403}, (method, path)


def test_a_viewer_can_read_and_change_nothing(viewer: Client, admin: Client) -> None:
    writes = [(m, p) for m, p in admin.routes() if m not in {"GET", "HEAD"} and "nothing-here" not in p]
    assert {path for _, path in writes} == {
        "/api/traffic/phi-4", "/api/failures/retry", "/api/ask", "/api/ask/open", "/api/paused",
        "/api/search", "/api/search/undo",
    }  # fmt: skip
    for method, path in writes:
        assert viewer(method, path, headers=WRITE, json={"target": "1/s"}).status_code == 403, (method, path)
    for path in ("/page", "/console.js", "/api/me", "/api/status", "/api/history", "/api/calls"):
        assert viewer("GET", path).status_code == 200, path
    assert viewer("GET", "/api/me").json()["may"] == dict.fromkeys(
        ("traffic", "ask", "retry", "pause", "search"), False
    )


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {**WRITE, "Origin": "https://elsewhere.example"},
        {**WRITE, "Sec-Fetch-Site": "cross-site"},
        {**WRITE, "Sec-Fetch-Site": "same-site"},
        {"Sec-Fetch-Site": "same-origin"},
    ],
)
def test_cross_site_writes_are_rejected(admin: Client, headers: dict[str, str]) -> None:
    for method, path, body in (
        ("PUT", "/api/traffic/phi-4", {"target": "1/s"}),
        ("POST", "/api/failures/retry", {}),
        ("POST", "/api/ask", {"prompt": "?"}),
        ("PUT", "/api/paused", {"paused": True}),
        ("POST", "/api/search", {}),
        ("POST", "/api/search/undo", {}),
    ):
        assert admin(method, path, headers=headers, json=body).status_code == 403, path


def test_every_response_has_security_headers(admin: Client) -> None:
    for path in ("/page", "/console.js", "/api/me", "/api/calls", "/nothing-here"):
        headers = admin("GET", path).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "frame-ancestors 'self'" in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cache-control"] in {"no-store", "private, no-cache"}


@pytest.mark.parametrize(
    ("asked", "more", "status", "words"),
    [
        ("PUT /api/traffic/phi-4", {"json": {"target": "12/parsec"}}, 422, "parsec"),
        ("PUT /api/traffic/phi-4", {"json": {"target": ""}}, 422, "target"),
        ("PUT /api/traffic/phi-4", {"json": {"target": "1/s", "sudo": 1}}, 422, "sudo"),
        ("PUT /api/traffic/phi-4", {"json": {"target": "1/s" + " " * 5000}}, 413, "bytes"),
        ("PUT /api/traffic/phi-4", {"data": "target=1/s"}, 415, "json"),
        ("PUT /api/traffic/gpt-17", {"json": {"target": "1/s"}}, 422, "gpt-17"),
        ("PUT /api/traffic/..%2f..", {"json": {"target": "1/s"}}, 404, "There is"),
        ("POST /api/ask", {"json": {"prompt": "?", "model": "gpt-17"}}, 200, "gpt-17"),
        ("POST /api/ask", {"json": {"prompt": ""}}, 422, "prompt"),
        ("POST /api/ask", {"data": b"{" * 5_000_000}, 413, "bytes"),
        ("POST /api/failures/retry", {"json": {"task_ids": [2**70]}}, 422, "task_ids.0"),
        ("POST /api/failures/retry", {"json": {"category": "\x00"}}, 422, "category"),
        ("POST /api/failures/retry", {"data": b'{"category": "\\ud800"}'}, 422, "JSON"),
        ("PUT /api/paused", {"json": {"paused": "perhaps"}}, 422, "paused"),
        ("GET /api/tasks/-5", {}, 404, "no task -5"),
        ("GET /api/tasks", {}, 422, "text"),
        ("GET /api/tasks?text=%00", {}, 422, "text"),
        ("GET /api/calls?model=%00", {}, 422, "model"),
        ("GET /api/failures?category=%00", {}, 422, "category"),
        ("GET /api/failures?before=2026-W01-1", {}, 422, "before"),
        ("GET /api/tasks/999999999", {}, 404, "999999999"),
        ("GET /api/tasks/99999999999999999999999", {}, 404, "no task"),
        ("GET /api/tasks/x", {}, 422, "task_id"),
        ("GET /api/calls?limit=100000", {}, 422, "limit"),
        ("GET /api/calls?before='", {}, 422, "before"),
        ("GET /api/failures?before=now", {}, 422, "before"),
    ],
)
def test_invalid_requests_are_reported_without_internals(
    admin: Client, asked: str, more: dict[str, Any], status: int, words: str
) -> None:
    method, path = asked.split(" ")
    headers = dict(WRITE)
    if isinstance(more.get("data"), bytes):
        headers["Content-Type"] = "application/json"
    answer = admin(method, path, headers=headers, **more)
    assert answer.status_code == status, answer.text
    assert words in answer.text
    for inside in ("Traceback", ".py", "psycopg2", "postgresql://"):
        assert inside not in answer.text


def test_without_a_login_the_page_is_a_page(solving_stack: Solving) -> None:
    anonymous = Client(solving_stack, None)
    answer = anonymous("GET", "/page")
    assert answer.status_code == 401
    assert answer.headers["content-type"].startswith("text/html")
    assert '<a href="../" target="_top">Log in to Airflow</a>' in answer.text
    assert anonymous("GET", "/api/me").json() == {"error": "Not authenticated"}


def test_an_unexpected_error_names_its_reference(solving: Solving, admin: Client) -> None:
    solving.rows("ALTER FUNCTION console_sends(timestamptz, integer, integer) RENAME TO console_sends_away")
    solving.rows(
        "CREATE FUNCTION console_sends(timestamptz, integer, integer) RETURNS TABLE (odd integer)"
        " LANGUAGE sql AS $$ SELECT 1 $$"
    )
    try:
        answer = admin("GET", "/api/history")
    finally:
        solving.rows("DROP FUNCTION console_sends(timestamptz, integer, integer)")
        solving.rows(
            "ALTER FUNCTION console_sends_away(timestamptz, integer, integer) RENAME TO console_sends"
        )
    assert answer.status_code == 500
    (reference,) = re.findall(r"See reference ([0-9a-f]{8}) in the api-server's log", answer.json()["error"])
    logs = "".join(path.read_text(errors="replace") for path in solving.stack.logs.glob("*api*"))
    assert f"reference={reference}" in logs


def test_a_task_is_found_by_id_and_external_id(solving: Solving, admin: Client) -> None:
    task = solving.value(
        "INSERT INTO tasks (prompt, status, external_id) VALUES ('?', 'failed', 'my/own:name') RETURNING id"
    )
    for text in (str(task), "my/own:name", f" {task} "):
        (found,) = admin("GET", "/api/tasks", params={"text": text}).json()["tasks"]
        assert (found["task_id"], found["external_id"]) == (task, "my/own:name")
    for text in ("my/own", "-1", "9" * 30, "%"):
        assert admin("GET", "/api/tasks", params={"text": text}).json() == {"tasks": []}
    solving.rows("DELETE FROM tasks WHERE id = %s", task)  # other tests expect no failed tasks


def test_spend_is_the_sum_of_the_calls(solving: Solving, admin: Client) -> None:
    model = solving.models[0]
    solving.rows(
        "INSERT INTO model_calls (call_id, model, outcome, finished_at, cost, completion_tokens)"
        " SELECT first_call_id(clock_timestamp()), %s, 'answered', clock_timestamp(), 0.25, 20",
        model,
    )
    total = solving.value("SELECT sum(cost)::float8 FROM model_calls WHERE model = %s", model)
    spans = admin("GET", "/api/spend").json()["spans"]
    assert [span["hours"] for span in spans] == [1, 24]
    for span in spans:
        (spent,) = (found for found in span["models"] if found["model"] == model)
        assert spent["cost_usd"] == pytest.approx(total)
        assert spent["completion_tokens"] >= 20


def test_the_batch_is_paused_and_resumed(solving: Solving, admin: Client) -> None:
    def held() -> bool:
        return bool(solving.value("SELECT held FROM solving"))

    for paused in (True, False):
        assert admin("PUT", "/api/paused", headers=WRITE, json={"paused": paused}).json() == {
            "paused": paused
        }
        wait_until(lambda paused=paused: held() is paused, 15, "the switch is in force")


def test_the_status_has_the_keys_of_the_command_line(solving: Solving, admin: Client) -> None:
    router = CommandLine(solving.stack.addresses)
    printed = router("status", "--json").json
    shown = admin("GET", "/api/status").json()
    assert printed.keys() <= shown.keys()
    assert printed["models"]["phi-4"].keys() <= shown["models"]["phi-4"].keys()
    every = [name for (name,) in solving.rows("SELECT name FROM categories ORDER BY name")]
    assert shown["category_names"] == every, "also categories without tasks"

    def same_target() -> bool:  # the shared reading is up to a second old
        models = admin("GET", "/api/status").json()["models"]
        return bool(models["phi-4"]["target"] == printed["models"]["phi-4"]["target"])

    wait_until(same_target, 3, "the target of the command line")


def test_setting_a_target_sets_the_variable_and_records_the_author(solving: Solving, admin: Client) -> None:
    with solving.stack.api("router") as other_user:
        other_user.set_variable(KEY, "4/s")
    before = solving.api.call("GET", f"/variables/{KEY}")
    began = time.monotonic()
    answer = admin("PUT", "/api/traffic/phi-4", headers=WRITE, json={"target": " 2/s,  5 at once "})
    assert answer.json() == {"model": "phi-4", "target": "2/s, 5 at once", "warnings": []}
    solving.changes.append(TargetChange(began, "phi-4", TrafficTarget.parse("2/s, 5 at once")))
    active_target = "SELECT target FROM newest_targets WHERE model = 'phi-4'"
    wait_until(lambda: solving.value(active_target) == "2/s, 5 at once", 3, "the target applies")
    after = solving.api.call("GET", f"/variables/{KEY}")
    assert after["value"] == "2/s,  5 at once"
    assert after["description"] == before["description"]

    def known() -> Any:
        return admin("GET", "/api/status").json()["variables"].get("phi-4")

    wait_until(lambda: known()["line"] == "2/s,  5 at once", 3, "the status has it")
    assert known()["edited_by"] == "admin"
    audit = {"event": "patch_variable", "order_by": "-event_log_id", "limit": 1}
    (newest,) = solving.api.call("GET", "/eventLogs", params=audit)["event_logs"]
    assert newest["owner"] == "admin"
    assert "2/s" not in newest["extra"], "Airflow keeps values out of its audit log"


def test_writes_are_in_airflows_audit_log_and_in_the_routers(solving: Solving, admin: Client) -> None:
    """With user, object, old and new value, and without the prompt."""
    solving.rows("DELETE FROM audit_log")
    writes = (
        ("PUT", "/api/traffic/phi-4", {"target": "3/s"}),
        ("PUT", "/api/traffic/phi-4", {"target": "4/s"}),
        ("PUT", "/api/paused", {"paused": True}),
        ("PUT", "/api/paused", {"paused": False}),
        ("POST", "/api/failures/retry", {}),
        ("POST", "/api/ask", {"prompt": "a secret prompt", "category": "general", "deadline_seconds": 20}),
    )
    for method, path, body in writes:
        assert admin(method, path, headers=WRITE, json=body).status_code == 200, path
    found = solving.api.call("GET", "/eventLogs", params={"order_by": "-event_log_id", "limit": 40})
    events = [event for event in found["event_logs"] if event["event"].startswith("router ")]
    assert {event["owner"] for event in events} == {"admin"}
    assert {event["event"] for event in events} >= {f"router {name}" for name in ("ask", "pause", "retry")}
    target = next(json.loads(event["extra"]) for event in events if event["event"] == "router set_target")
    assert (target["object"], target["before"], target["after"]) == ("phi-4", "3/s", "4/s")
    wait_until(
        lambda: solving.rows("SELECT FROM audit_log WHERE action = 'ask'"), 5, "the entry of the request"
    )
    entries = solving.rows("SELECT by, via, action, before, after FROM audit_log ORDER BY entry")
    assert {entry[:2] for entry in entries} == {("admin", "console")}
    assert [entry[2] for entry in entries] == ["traffic", "traffic", "pause", "pause", "ask"]
    assert entries[1][3:] == ("3/s", "4/s")
    assert "a secret prompt" not in json.dumps([events, entries], default=str)


def test_a_failed_task_is_retried_and_its_details_shown(solving: Solving, admin: Client) -> None:
    solving.insert(200)  # tasks that run before the workers have no Airflow task
    wait_until(lambda: workers_are_there(solving), 40, "all workers at work")
    solving.rows("DELETE FROM tasks WHERE status = 'unsolved'")
    solving.rows("INSERT INTO tasks (prompt, status, failure) VALUES ('Why?', 'failed', 'set by the test')")
    (failure,) = admin("GET", "/api/failures").json()["failures"]
    assert failure["failure"] == "set by the test"
    task = failure["task_id"]
    asked = {"task_ids": [task]}
    assert admin("POST", "/api/failures/retry", headers=WRITE, json=asked).json()["unsolved"] == 1
    wait_until(lambda: solving.unsolved() == 0, 30, "solved after all")
    assert admin("GET", "/api/failures").json()["failures"] == []
    details = wait_for(lambda: _with_log(admin, task), 10, "the details with the Airflow log")
    assert details["task"]["state"] == "solved"
    assert details["calls"][-1]["settlement"] == "solved"
    log = details["logs"][details["calls"][-1]["call_id"]]
    assert log.startswith("/dags/solve_tasks/runs/")
    assert solving.stack.api("admin").call("GET", "/dags/solve_tasks")["dag_id"] == "solve_tasks"


def workers_are_there(solving: Solving) -> bool:
    states = {entry["state"] for entry in solving.airflow_tasks(solving.run()["dag_run_id"])}
    return states == {"deferred"}


def _with_log(admin: Client, task: int) -> Any:
    details = admin("GET", f"/api/tasks/{task}").json()
    return details if details["logs"] else None


def test_a_worker_links_to_its_models_row(solving: Solving) -> None:
    solving.insert(2)
    solving.until_drained(30)
    run = solving.run()["dag_run_id"]
    worker = "work"
    path = f"/dags/solve_tasks/dagRuns/{run}/taskInstances/{worker}/links"

    def linked() -> Any:
        return solving.api.call("GET", path, params={"map_index": 0}).get("extra_links")

    links = wait_for(lambda: (found := linked()) and any(found.values()) and found, 15, "the link")
    (link,) = links.values()
    assert link.endswith(f"/router/page#models/{solving.models[0]}")


def test_all_clients_share_one_reading(solving: Solving) -> None:
    seen: dict[int, set[str]] = {}

    def follow(number: int) -> None:
        viewer = Client(solving, "viewer")
        until = time.monotonic() + STREAM_SECONDS
        with viewer("GET", "/api/live", stream=True) as answer:
            for line in answer.iter_lines():
                seen.setdefault(number, set()).add(json.loads(line)["at"])
                if time.monotonic() > until:
                    return

    following = [threading.Thread(target=follow, args=(n,)) for n in range(6)]
    for thread in following:
        thread.start()
    for thread in following:
        thread.join()
    assert all(len(times) >= 2 for times in seen.values()), "the stream is updated"
    everything = set().union(*seen.values())
    assert len(everything) <= STREAM_SECONDS + 4, "clients do not read separately"


def test_asking_streams_progress(solving: Solving, admin: Client) -> None:
    lines, arrived = [], []
    body = {"prompt": "Why is <b>the sky</b> blue?", "category": "general"}
    with admin("POST", "/api/ask", headers=WRITE, json=body, stream=True) as answer:
        for line in answer.iter_lines():
            lines.append(json.loads(line))
            arrived.append(time.monotonic())
    kinds = [line["event"]["kind"] for line in lines if "event" in line]
    assert kinds[0] == "categorised"
    assert {"asked", "ended"} <= set(kinds)
    assert lines[-1] == {"end": True}
    given = next(line["answer"] for line in lines if "answer" in line)
    assert given["text"]
    assert given["category"] == "general"
    assert arrived[-1] - arrived[0] > 0.02, "all lines arrived together"
    details = admin("GET", f"/api/tasks/{given['task_id']}").json()
    assert details["task"]["prompt"] == body["prompt"]
    assert len(details["calls"]) == len(given["calls"])


@pytest.fixture
def slow_first(solving: Solving) -> Iterator[str]:
    """The preferred model for `general`, slowed down to 0.4 to 8 s per answer."""
    first = solving.value("SELECT model FROM rankings WHERE category = 'general' ORDER BY place LIMIT 1")
    conditions = f"{solving.stack.backend_url}/conditions"
    requests.put(conditions, json=[{"model": first, "latency_factor": 8}], timeout=5).raise_for_status()
    yield first
    requests.put(conditions, json=[], timeout=5).raise_for_status()


def test_a_late_answer_replaces_the_provisional_one(solving: Solving, admin: Client, slow_first: str) -> None:
    body = {"prompt": "Why is the sea salty?", "category": "general", "deadline_seconds": 0.3}
    with admin("POST", "/api/ask", headers=WRITE, json=body, stream=True) as answer:
        lines = [json.loads(line) for line in answer.iter_lines()]
    (given,) = [line["answer"] for line in lines if "answer" in line]
    assert given["provisional"]
    assert given["rank"] != "chosen model"
    late = [line["late"] for line in lines if "late" in line][-1]
    assert (late["late"], late["provisional"], late["model"]) == (True, False, slow_first)
    assert late["rank"] == "chosen model"
    assert lines.index({"late": late}) > lines.index({"answer": given})
    kept = admin("GET", f"/api/tasks/{given['task_id']}").json()["task"]
    assert (kept["status"], kept["answered_by"], kept["answer"]) == ("solved", slow_first, late["text"])
