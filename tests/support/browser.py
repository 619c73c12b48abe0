"""Headless Chromium for tests of pages."""

from __future__ import annotations

import os
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.expected_conditions import element_to_be_clickable
from selenium.webdriver.support.wait import WebDriverWait

CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless=new",
    "--no-sandbox",  # Chromium refuses its sandbox to root
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--no-proxy-server",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1400,1000",
)
TIMEOUT_SECONDS = 30.0


class Browser:
    """Browser of one user. `show` saves a screenshot in `pictures`."""

    def __init__(self, driver: webdriver.Chrome, url: str, pictures: Path) -> None:
        self.driver = driver
        self.url = url
        self._pictures = pictures

    def open(self, path: str) -> None:
        """Loads a page, also if only the fragment differs."""
        self.driver.get("about:blank")
        self.driver.get(self.url + path)

    def log_in(self, user: str, password: str) -> None:
        """Logs in through Airflow's form."""
        self.driver.delete_all_cookies()
        self.open("/auth/login")
        self.find("[name=username]").send_keys(user)
        self.find("[name=password]").send_keys(password)
        self.click("button[type=submit]")
        self.until(lambda: "/auth/login" not in self.driver.current_url, "logged in")

    def find(self, what: str, how: str = By.CSS_SELECTOR) -> WebElement:
        """Returns an element as soon as it can be clicked."""
        found: WebElement = WebDriverWait(self.driver, TIMEOUT_SECONDS).until(
            element_to_be_clickable((how, what)), f"{what} cannot be clicked on {self.driver.current_url}"
        )
        return found

    def click(self, what: str, how: str = By.CSS_SELECTOR) -> None:
        """Clicks an element as soon as possible; retries if it is replaced meanwhile."""

        def clicked(_driver: webdriver.Chrome) -> bool:
            self.find(what, how).click()
            return True

        waiting = WebDriverWait(
            self.driver, TIMEOUT_SECONDS, ignored_exceptions=(StaleElementReferenceException,)
        )
        waiting.until(clicked)

    def all(self, what: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, what)

    def text(self, what: str = "body") -> str:
        """Returns the visible text of an element, or an empty string."""
        try:
            return "\n".join(element.text for element in self.all(what))
        except StaleElementReferenceException:
            return ""

    def run(self, script: str, *values: Any) -> Any:
        return self.driver.execute_script(script, *values)

    def run_async(self, script: str, *values: Any) -> Any:
        """Returns the value that the script passes to its last argument."""
        return self.driver.execute_async_script(script, *values)

    def until(self, condition: Callable[[], Any], what: str, seconds: float = TIMEOUT_SECONDS) -> Any:
        """Returns the first true result of `condition`."""
        waiting = WebDriverWait(self.driver, seconds, poll_frequency=0.1)
        return waiting.until(lambda _: condition(), f"{what}: not on {self.driver.current_url}")

    def until_text(self, words: str, where: str = "body", seconds: float = TIMEOUT_SECONDS) -> None:
        self.until(lambda: words in self.text(where), f"{words!r} in {where}", seconds)

    def show(self, name: str) -> None:
        self.driver.save_screenshot(str(self._pictures / f"{name}.png"))


@contextmanager
def browsing(url: str, folder: Path) -> Iterator[Browser]:
    """Starts Chromium for the pages of `url`. Without Chromium the test is skipped, or fails in CI."""
    chromium = next(filter(None, map(shutil.which, CHROMIUM)), None)
    driver_program = shutil.which("chromedriver")
    if chromium is None or driver_program is None:
        message = "Chromium or its driver is missing (on Debian: apt-get install chromium chromium-driver)"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS, f"--user-data-dir={folder / 'profile'}"):
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=Service(driver_program))
    driver.set_script_timeout(30)
    try:
        yield Browser(driver, url, folder)
    finally:
        driver.quit()


def axe_core(folder: Path) -> str:
    """Returns the source of axe-core from the npm registry; skips the test if it is unreachable."""
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("npm is missing, needed for axe-core")
    command = [npm, "pack", "axe-core@4", "--silent", "--pack-destination", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=60, cwd=folder)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
        pytest.skip("axe-core cannot be downloaded from the npm registry")
    (archive,) = folder.glob("axe-core-*.tgz")
    with tarfile.open(archive) as packed:
        source = packed.extractfile("package/axe.min.js")
        assert source is not None
        return source.read().decode()
