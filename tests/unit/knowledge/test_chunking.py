"""Chunking: texts are split into short entries, each with its heading."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.errors import InputError
from router.knowledge.chunking import MAX_CHARACTERS, decode_text, file_entries, task_entry


def texts(text: str, name: str = "a.md") -> list[tuple[str, str]]:
    return [(entry.source, entry.text) for entry in file_entries("k", name, text)]


def test_each_section_becomes_an_entry_with_its_heading_path():
    text = "before\n\n# Cats\nThey purr.\n\n## Food\nFish.\n\n# Dogs\nThey bark.\n"
    assert texts(text) == [
        ("a.md", "before"),
        ("a.md: Cats", "They purr."),
        ("a.md: Cats / Food", "Fish."),
        ("a.md: Dogs", "They bark."),
    ]


def test_comment_in_code_fence_is_not_a_heading():
    assert texts("# Shell\n```\n# a comment\nls\n```\n") == [("a.md: Shell", "```\n# a comment\nls\n```")]


def test_long_text_is_split_between_sentences_without_loss():
    sentences = [f"Sentence number {number} says something." for number in range(200)]
    chunks = [text for _, text in texts(" ".join(sentences))]
    assert len(chunks) > 3
    assert all(len(chunk) <= MAX_CHARACTERS for chunk in chunks)
    assert all(chunk.endswith(".") for chunk in chunks)
    assert " ".join(chunks).split() == " ".join(sentences).split()


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=4000))
def test_entries_of_any_text_are_bounded(text: str):
    for entry in file_entries("k", "a.txt", text):
        assert 0 < len(entry.text) <= MAX_CHARACTERS


def test_json_lines_give_one_entry_per_line():
    lines = '{"text": "one", "title": "T"}\n\n{"text": "two"}\n'
    assert texts(lines, "faq.jsonl") == [("faq.jsonl:1", "one"), ("faq.jsonl:3", "two")]


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("{", "line 2 is not valid JSON"),
        ("[" * 100_000, "line 2 is not valid JSON"),
        ('{"text": ""}', 'not an object with a "text"'),
        ("[]", "line 2 is not an object"),
    ],
)
def test_invalid_line_is_reported_with_its_number(line: str, why: str):
    with pytest.raises(InputError, match=why):
        texts('{"text": "one"}\n' + line, "faq.jsonl")


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"\x89PNG\r\n\x00", "NUL"),
        (b"fine\nM\xfcnchen", "line 2 contains the byte 0xfc"),
        ("München".encode("utf-16"), "UTF-16"),
        (b" \n", "is empty"),
    ],
)
def test_content_that_is_not_text_is_rejected_with_the_reason(content: bytes, why: str):
    with pytest.raises(InputError, match=why):
        decode_text(content)


def test_byte_order_mark_is_dropped():
    assert decode_text(b"\xef\xbb\xbfhello") == "hello"


def test_solved_task_becomes_question_and_answer():
    entry = task_entry(7, "Why\n is it?  ", " Because. ")
    assert entry.display_text == "Question: Why is it?\nAnswer: Because."
    assert entry.source == "task 7"
    assert len(task_entry(7, "x" * 10_000, "y" * 10_000).display_text) < 3000
