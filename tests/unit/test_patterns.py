"""Patterns that see text of users take time linear in its length.

Each pattern runs on texts of two lengths, made to backtrack: a run of one piece, with another end. Four times
the length may take a few times as long; a quadratic pattern takes sixteen times as long.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
import time
from collections.abc import Iterator
from typing import Any

import pytest

import router
from router.classification.features import normalized, shapes
from router.settings import config_folder, load_categories

PIECES = (
    " ", "\n", " \n", "\t", "a", "ab ", "1", "1,", "1.", "<", "< ", "</", "#", "# ", "`", "```\n", ".",
    ". ", "*", "(", "$", "=", "-", "\\", '"', "'", "request", "select from ", "what ", "1x+", "how many ",
    "\u4e00", "verdict ", "http://", "password=", "token ", "Bearer ", "a@", ":", "/",
)  # fmt: skip
BEGINNINGS = ("", "a", "<", "# ")
ENDS = ("b", "!\n")
SHORT, LONG = 500, 2_000
PROMPT_CHARACTERS = 1_600  # that are classified
ALLOWED = 8.0  # times the cost of the short text
NOISE_SECONDS = 0.004


def module_patterns() -> Iterator[tuple[str, re.Pattern[Any]]]:
    for module in pkgutil.walk_packages(router.__path__, "router."):
        if module.name.endswith("__main__"):
            continue
        for name, value in vars(importlib.import_module(module.name)).items():
            if isinstance(value, re.Pattern):
                yield f"{module.name}.{name}", value


def attacks(length: int) -> list[str]:
    return [
        beginning + piece * (length // len(piece)) + end
        for piece in PIECES
        for beginning in BEGINNINGS
        for end in ENDS
    ]


def seconds(pattern: re.Pattern[Any], text: str) -> float:
    content: Any = text.encode() if isinstance(pattern.pattern, bytes) else text
    began = time.process_time()
    for _ in pattern.finditer(content):
        pass
    return time.process_time() - began


def is_linear(pattern: re.Pattern[Any], short: str, long: str) -> bool:
    """Measures again what seems too slow: another process may have taken the cache."""
    for _ in range(10):
        took = seconds(pattern, long)
        if took < NOISE_SECONDS or took < ALLOWED * seconds(pattern, short):
            return True
    return False


def test_every_pattern_of_the_package_is_linear():
    pairs = list(zip(attacks(SHORT), attacks(LONG), strict=True))
    found = dict(module_patterns())
    slow = {
        name: long[:12]
        for name, pattern in found.items()
        for short, long in pairs
        if not is_linear(pattern, short, long)
    }
    assert len(found) > 30
    assert not slow


def test_rules_of_categories_take_no_longer_on_an_adversarial_prompt_than_on_a_whole_text():
    rules = [re.compile(rule.pattern) for rule in load_categories(config_folder()).rules if rule.pattern]
    ordinary = (
        "The capital of the country was moved twice, as 3 of 4 historians in this 1 article say. " * 20
    )[:PROMPT_CHARACTERS]

    def cost(prompt: str) -> float:
        began = time.process_time()
        text = normalized(prompt)
        shapes([prompt], [text])
        for rule in rules:
            rule.search(text)
        return time.process_time() - began

    def is_quick(attack: str) -> bool:
        """Measures both again if it seems slow: another process may have taken the cache."""
        return any(
            min(cost(attack) for _ in range(3)) <= 4 * min(cost(ordinary) for _ in range(5)) for _ in range(3)
        )

    assert not [attack[:20] for attack in attacks(PROMPT_CHARACTERS) if not is_quick(attack)]


@pytest.mark.parametrize("prompt", ["a" + "\n" * 1_590 + "b", "a" + " \n \r\n" * 400 + "b", "\n" * 9_999])
def test_a_run_of_spaces_of_a_prompt_becomes_at_most_an_empty_line(prompt: str):
    assert normalized(prompt) in {"a\n\nb", ""}


def test_an_indented_line_stays_indented():
    assert normalized("def f():\n    return 1\n\n\n\n  x  y \n z") == "def f():\n return 1\n\n x y\n z"
