"""What an operator does in Airflow's own pages: edits a Variable, switches a DAG, triggers one."""

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


def test_editing_a_variable_in_airflows_form_changes_the_traffic(solving: Solving, admin: Browser) -> None:
    model = solving.models[0]
    admin.open("/variables")
    admin.click(f"//tr[.//text()='traffic.{model}']//*[@aria-label='Edit Variable']", By.XPATH)
    fill_in(admin.find("[role=dialog] textarea[name=value]"), "3/s, 20 at once")
    admin.show("variable-form")
    admin.click("//*[@role='dialog']//button[normalize-space()='Save']", By.XPATH)
    saved = time.monotonic()
    in_force = "SELECT target FROM newest_targets WHERE model = %s"
    wait_until(lambda: solving.value(in_force, model) == "3/s, 20 at once", 5, "the edit is in force")
    say(f"saved in the form -> in force: {time.monotonic() - saved:.2f} s")
    admin.find(f"//tr[.//text()='traffic.{model}' and .//text()='3/s, 20 at once']", By.XPATH)
    admin.show("variables")


def toggle_pause(admin: Browser) -> float:
    """The switch beside the DAG's name; returns the moment before the click."""
    switch = admin.find("[data-testid=toggle-pause]")
    clicking = time.monotonic()
    switch.click()
    return clicking


def test_the_switch_on_the_dags_page_stops_and_starts_the_solving(solving: Solving, admin: Browser) -> None:
    solving.insert(400)
    admin.open(f"/dags/{DAG}")
    wait_for(lambda: solving.arrived(time.monotonic() - 1), 60, "solving")
    toggle_pause(admin)
    wait_until(lambda: solving.api.is_paused(DAG), 10, "the DAG is paused")
    paused = time.monotonic()
    wait_until(lambda: time.monotonic() > paused + 2, 3, "the pause has had its time")
    admin.show("paused")
    unpausing = toggle_pause(admin)
    wait_until(lambda: not solving.api.is_paused(DAG), 10, "the DAG is unpaused")
    wait_for(lambda: solving.arrived(unpausing), 5, "sending goes on")
    admin.show("unpaused")
    solving.stop_backlog()
    assert [at for at in solving.arrived(paused + 2) if at < unpausing] == []


def test_triggering_the_dag_of_a_prompt_with_airflows_button_answers_it(
    solving: Solving, admin: Browser
) -> None:
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
        40, "the run has ended well",
    )  # fmt: skip
    admin.show("triggered")
