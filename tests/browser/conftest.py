"""One logged-in browser for all tests, because starting it is slow."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.browser import Browser, browsing
from tests.support.stack import Solving


@pytest.fixture(scope="session")
def admin(solving_stack: Solving, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """Browser logged in as admin."""
    with browsing(solving_stack.stack.airflow_url, tmp_path_factory.mktemp("admin")) as browser:
        browser.log_in("admin", solving_stack.stack.passwords["admin"])
        yield browser
