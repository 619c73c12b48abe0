"""What an operator does in Airflow's own pages, in a browser: log in, edit a Variable, switch the DAG."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.expected_conditions import element_to_be_clickable
from selenium.webdriver.support.wait import WebDriverWait

from tests.solving import DAG, Solving, say, wait_for, wait_until

pytestmark = [pytest.mark.airflow, pytest.mark.alone, pytest.mark.timeout(180)]

CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",  # Chromium refuses its sandbox to root
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1400,1000",
)
PATIENCE_SECONDS = 30


class Page:
    """Airflow's pages as a logged-in admin sees them; `show` keeps a picture in `pictures`."""

    def __init__(self, driver: webdriver.Chrome, url: str, pictures: Path) -> None:
        self._driver = driver
        self._url = url
        self._pictures = pictures

    def open(self, path: str) -> None:
        self._driver.get(self._url + path)

    def find(self, how: str, what: str) -> WebElement:
        """The element as soon as it can be clicked."""
        found: WebElement = WebDriverWait(self._driver, PATIENCE_SECONDS).until(
            element_to_be_clickable((how, what)), f"{what} cannot be clicked on {self._driver.current_url}"
        )
        return found

    def show(self, name: str) -> None:
        self._driver.save_screenshot(str(self._pictures / f"{name}.png"))

    def log_in(self, user: str, password: str) -> None:
        self.open("/")
        self.find(By.NAME, "username").send_keys(user)
        self.find(By.NAME, "password").send_keys(password)
        self.find(By.CSS_SELECTOR, "button[type=submit]").click()
        wait_until(lambda: "/auth/login" not in self._driver.current_url, PATIENCE_SECONDS, "logged in")

    def edit_variable(self, key: str, value: str) -> None:
        """Through the form that the pencil in the Variable's line opens; returns when Save was clicked."""
        self.open("/variables")
        line = f"//tr[.//text()='{key}']"
        self.find(By.XPATH, f"{line}//*[@aria-label='Edit Variable']").click()
        form = self.find(By.CSS_SELECTOR, "[role=dialog] textarea[name=value]")
        form.send_keys(Keys.CONTROL, "a")
        form.send_keys(value)
        self.show("variable-form")
        self.find(By.XPATH, "//*[@role='dialog']//button[normalize-space()='Save']").click()

    def toggle_pause(self, dag: str) -> float:
        """The switch beside the DAG's name; returns the moment before the click."""
        self.open(f"/dags/{dag}")
        switch = self.find(By.CSS_SELECTOR, "[data-testid=toggle-pause]")
        clicking = time.monotonic()
        switch.click()
        return clicking


@pytest.fixture
def page(solving: Solving, tmp_path: Path) -> Iterator[Page]:
    """A headless Chromium on Airflow, logged in as admin."""
    chromium = next(filter(None, map(shutil.which, CHROMIUM)), None)
    driver_program = shutil.which("chromedriver")
    if chromium is None or driver_program is None:
        pytest.skip("no Chromium with its driver here (on Debian: apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS, f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=Service(driver_program))
    try:
        page = Page(driver, solving.stack.airflow_url, tmp_path)
        page.log_in("admin", solving.stack.passwords["admin"])
        yield page
    finally:
        driver.quit()


def test_editing_a_variable_in_airflows_form_changes_the_traffic(solving: Solving, page: Page) -> None:
    model = solving.models[0]
    page.edit_variable(f"traffic.{model}", "3/s, 20 at once")
    saved = time.monotonic()
    in_force = "SELECT target FROM newest_targets WHERE model = %s"
    wait_until(lambda: solving.value(in_force, model) == "3/s, 20 at once", 5, "the edit is in force")
    say(f"saved in the form -> in force: {time.monotonic() - saved:.2f} s")
    page.open("/variables")
    page.find(By.XPATH, f"//tr[.//text()='traffic.{model}' and .//text()='3/s, 20 at once']")
    page.show("variables")


def test_the_switch_on_the_dags_page_stops_and_starts_the_solving(solving: Solving, page: Page) -> None:
    solving.insert(400)
    wait_for(lambda: solving.arrived(time.monotonic() - 1), 60, "solving")
    page.toggle_pause(DAG)
    wait_until(lambda: solving.api.is_paused(DAG), 10, "the DAG is paused")
    paused = time.monotonic()
    wait_until(lambda: time.monotonic() > paused + 2, 3, "the pause has had its time")
    page.show("paused")
    unpausing = page.toggle_pause(DAG)
    wait_until(lambda: not solving.api.is_paused(DAG), 10, "the DAG is unpaused")
    wait_for(lambda: solving.arrived(unpausing), 5, "sending goes on")
    page.show("unpaused")
    solving.stop_backlog()
    assert [at for at in solving.arrived(paused + 2) if at < unpausing] == []
