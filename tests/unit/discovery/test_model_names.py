"""Spellings of model names."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.discovery.model_names import normal_name, roster_name, same_model

SPELLINGS = (
    (
        "meta-llama/Llama-3.3-70B-Instruct", "llama3.3:70b-instruct", "Meta-Llama-3.3-70B-Instruct-FP8",
        "accounts/fireworks/models/llama-v3p3-70b-instruct", "llama-3.3-70b-versatile",
        "meta-llama/Llama-3.3-70B-Instruct-Turbo", "LLAMA_3.3_70B_INSTRUCT", "llama-3.3-70b-instruct:free",
        "Llama-3.3-70B-Instruct-Q4_K_M", "Llama-3.3-70B-Instruct-w4a16",
    ),
    ("llama-3.3-70b", "llama3.3:70b", "unsloth/Llama-3.3-70B-fp8", "llama-3.3-70b@latest"),
    ("google/gemma-2-27b-it", "gemma2:27b-instruct"),
    ("Llama-2-7b-chat-hf", "llama-2-7b-chat"),
    ("llama-3.1-8b-instant", "Meta-Llama-3.1-8B-Instruct"),
    ("llama-3.1-70b",), ("llama-3-70b",), ("llama-3.1-405b",), ("gpt-4",), ("gpt-4-turbo",), ("deepseek-v3",),
    ("deepseek-v3-0324",), ("llama-3.1-supernova",), ("llama-3.1-supernova-lite",),
)  # fmt: skip


def test_spellings_of_one_model_share_a_normal_name() -> None:
    for spellings in SPELLINGS:
        assert len({normal_name(spelling) for spelling in spellings}) == 1, spellings
    assert len({normal_name(spellings[0]) for spellings in SPELLINGS}) == len(SPELLINGS)


def test_same_model_ignores_the_tuning() -> None:
    assert same_model("llama-3.1-8b", "meta-llama/Llama-3.1-8B-Instruct")
    assert same_model("gemma-2-27b", "google/gemma-2-27b-it")
    assert not same_model("llama-3.1-8b", "llama-3.1-70b-instruct")
    assert normal_name("llama-3.1-8b") != normal_name("llama-3.1-8b-instruct")


@pytest.mark.parametrize(
    ("model_id", "name"),
    [
        ("meta-llama/Llama-3.3-70B-Instruct", "llama-3.3-70b-instruct"),
        ("@cf/meta/llama-3.1-8b", "llama-3.1-8b"),
        ("llama3.3:70b", "llama3.3-70b"),
        ("Llama 4 Scout", "llama-4-scout"),
    ],
)
def test_roster_names(model_id: str, name: str) -> None:
    assert roster_name(model_id) == name


@given(st.text(max_size=80))
def test_any_text_is_a_valid_name_or_refused(text: str) -> None:
    try:
        name = roster_name(text)
    except ValueError:
        return
    assert "/" not in name
    assert ".." not in name
    assert normal_name(name) == normal_name(text)


@given(st.lists(st.sampled_from(list(itertools.chain(*SPELLINGS))), min_size=1, max_size=3))
def test_normalizing_is_idempotent(names: list[str]) -> None:
    for name in names:
        assert normal_name(normal_name(name)) == normal_name(name)
