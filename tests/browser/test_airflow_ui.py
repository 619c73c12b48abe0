"""Airflow's own pages: editing a Variable, pausing a DAG, triggering a DAG."""

from __future__ import annotations

import time

import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

from tests.support.browser import Browser
from tests.support.stack import DAG, Solving, say, wait_for, wait_until

pytestmark = [pytest.mark.airflow, pytest.mark.alone, pytest.mark.timeout(180)]

ASK = "ask_prompt"
PROMPT = "Which sea is the saltiest?"


def fill_in(field: WebElement, text: str) -> None:
    field.send_keys(Keys.CONTROL, "a")
    field.send_keys(text)


def test_editing_a_variable_changes_the_traffic(solving: Solving, admin: Browser) -> None:
    model = solving.models[0]
    admin.open("/variables")
    admin.click(f"//tr[.//text()='traffic.{model}']//*[@aria-label='Edit Variable']", By.XPATH)
    fill_in(admin.find("[role=dialog] textarea[name=value]"), "3/s, 20 at once")
    admin.show("variable-form")
    admin.click("//*[@role='dialog']//button[normalize-space()='Save']", By.XPATH)
    saved = time.monotonic()
    active_target = "SELECT target FROM newest_targets WHERE model = %s"
    wait_until(lambda: solving.value(active_target, model) == "3/s, 20 at once", 5, "the edit is active")
    say(f"saved in the form -> active: {time.monotonic() - saved:.2f} s")
    admin.find(f"//tr[.//text()='traffic.{model}' and .//text()='3/s, 20 at once']", By.XPATH)
    admin.show("variables")


def toggle_pause(admin: Browser) -> float:
    """Clicks the DAG's switch and returns the time before the click."""
    switch = admin.find("[data-testid=toggle-pause]")
    clicking = time.monotonic()
    switch.click()
    return clicking


def test_pausing_the_dag_stops_and_resumes_sending(solving: Solving, admin: Browser) -> None:
    solving.insert(400)
    admin.open(f"/dags/{DAG}")
    wait_for(lambda: solving.arrived(time.monotonic() - 1), 60, "solving")
    toggle_pause(admin)
    wait_until(lambda: solving.api.is_paused(DAG), 10, "the DAG is paused")
    paused = time.monotonic()
    wait_until(lambda: time.monotonic() > paused + 2, 3, "two seconds after the pause")
    admin.show("paused")
    unpausing = toggle_pause(admin)
    wait_until(lambda: not solving.api.is_paused(DAG), 10, "the DAG is unpaused")
    wait_for(lambda: solving.arrived(unpausing), 5, "sending resumes")
    admin.show("unpaused")
    solving.stop_backlog()
    assert [at for at in solving.arrived(paused + 2) if at < unpausing] == []


def test_triggering_ask_prompt_answers_the_prompt(solving: Solving, admin: Browser) -> None:
    admin.open(f"/dags/{ASK}")
    admin.click("//button[normalize-space()='Trigger']", By.XPATH)
    fill_in(admin.find("[role=dialog] textarea[name=element_prompt]"), PROMPT)
    admin.show("trigger-form")
    admin.click("//*[@role='dialog']//button[normalize-space()='Trigger']", By.XPATH)
    answered = "SELECT answer IS NOT NULL FROM tasks WHERE prompt = %s"
    wait_until(lambda: solving.rows(answered, PROMPT) == [(True,)], 40, "the prompt is answered")
    run = solving.api.runs(ASK, limit=1)[0]
    wait_for(
        lambda: solving.api.call("GET", f"/dags/{ASK}/dagRuns/{run['dag_run_id']}")["state"] == "success",
        40, "the run succeeded",
    )  # fmt: skip
    admin.show("triggered")
