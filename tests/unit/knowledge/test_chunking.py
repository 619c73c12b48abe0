"""Texts become entries: short enough to be read, under the heading that they stand below."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.errors import InputError
from router.knowledge.chunking import LONGEST_CHARACTERS, file_entries, task_entry, text_of


def texts(text: str, name: str = "a.md") -> list[tuple[str, str]]:
    return [(entry.source, entry.text) for entry in file_entries("k", name, text)]


def test_each_section_is_an_entry_under_its_headings():
    text = "before\n\n# Cats\nThey purr.\n\n## Food\nFish.\n\n# Dogs\nThey bark.\n"
    assert texts(text) == [
        ("a.md", "before"),
        ("a.md: Cats", "They purr."),
        ("a.md: Cats / Food", "Fish."),
        ("a.md: Dogs", "They bark."),
    ]


def test_a_comment_in_a_fence_of_code_is_no_heading():
    assert texts("# Shell\n```\n# a comment\nls\n```\n") == [("a.md: Shell", "```\n# a comment\nls\n```")]


def test_long_texts_are_split_between_sentences_and_nothing_is_lost():
    sentences = [f"Sentence number {number} says something." for number in range(200)]
    pieces = [text for _, text in texts(" ".join(sentences))]
    assert len(pieces) > 3
    assert all(len(piece) <= LONGEST_CHARACTERS for piece in pieces)
    assert all(piece.endswith(".") for piece in pieces)
    assert " ".join(pieces).split() == " ".join(sentences).split()


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=4000))
def test_any_text_gives_bounded_pieces(text: str):
    for entry in file_entries("k", "a.txt", text):
        assert 0 < len(entry.text) <= LONGEST_CHARACTERS


def test_json_lines_give_one_entry_a_line():
    lines = '{"text": "one", "title": "T"}\n\n{"text": "two"}\n'
    assert texts(lines, "faq.jsonl") == [("faq.jsonl:1", "one"), ("faq.jsonl:3", "two")]


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("{", "line 2 is not JSON"),
        ("[" * 100_000, "line 2 is not JSON"),
        ('{"text": ""}', 'no object with a "text"'),
        ("[]", "line 2 is no"),
    ],
)
def test_a_bad_line_is_named(line: str, why: str):
    with pytest.raises(InputError, match=why):
        texts('{"text": "one"}\n' + line, "faq.jsonl")


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"\x89PNG\r\n\x00", "NUL"),
        (b"fine\nM\xfcnchen", "line 2 holds the byte 0xfc"),
        ("München".encode("utf-16"), "UTF-16"),
        (b" \n", "is empty"),
    ],
)
def test_what_is_not_text_is_refused_with_the_reason(content: bytes, why: str):
    with pytest.raises(InputError, match=why):
        text_of(content)


def test_a_byte_order_mark_is_no_text():
    assert text_of(b"\xef\xbb\xbfhello") == "hello"


def test_a_solved_task_is_a_question_and_its_answer():
    entry = task_entry(7, "Why\n is it?  ", " Because. ")
    assert entry.shown == "Question: Why is it?\nAnswer: Because."
    assert entry.source == "task 7"
    assert len(task_entry(7, "x" * 10_000, "y" * 10_000).shown) < 3000
