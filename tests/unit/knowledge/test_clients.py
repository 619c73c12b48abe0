"""A search sees the solved tasks of its own client only, and tells nothing about those of others."""

from __future__ import annotations

import pytest

from router.knowledge.chunking import Entry, task_entry
from router.knowledge.index import OTHER_TASK, KnowledgeIndex
from router.knowledge.results import SearchResult

CANARY = "xylophone-7431"
QUESTIONS = (
    f"What is {CANARY}?",
    "Which secret code opens the vault?",
    "vault vault vault",
    f"{CANARY} refund",
)
HANDBOOK = [
    Entry("file:a", "handbook.md", "", "A refund is paid within thirty days after the return of the goods."),
    Entry("file:b", "handbook.md", "", "The office opens at nine and closes at five on working days."),
]


def index_of(*entries: Entry) -> KnowledgeIndex:
    index = KnowledgeIndex()
    with index.writing() as writer:
        for entry in (*HANDBOOK, *entries):
            writer.add(entry)
        writer.commit()
    return index


def secret(task_id: int, client: str, word: str = CANARY) -> Entry:
    return task_entry(
        task_id, "Which secret code opens the vault?", f"The code of the vault is {word}.", client
    )


def texts(found: SearchResult) -> str:
    return found.as_answer() + "".join(passage.text + passage.source for passage in found.passages)


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize(
    ("owner", "other"), [("alice", "bob"), ("alice", ""), ("", "bob"), ("alice", "alice2")]
)
def test_a_task_is_found_for_its_own_client_only(owner: str, other: str, question: str):
    index = index_of(secret(17, owner))
    for limit in (1, 5, 100):
        assert CANARY not in texts(index.search(question, limit, other))
        assert "task 17" not in texts(index.search(question, limit, other))
    found = index.search("Which secret code opens the vault?", 5, owner)
    assert CANARY in texts(found)
    assert found.passages[0].source == "task 17"


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_result_does_not_tell_which_words_others_use(question: str):
    with_canary = index_of(*(secret(number, "alice") for number in range(9)))
    without = index_of(*(secret(number, "alice", "something-else") for number in range(9)))
    assert with_canary.search(question, 5, "bob") == without.search(question, 5, "bob")


def test_confidence_is_that_of_an_index_of_what_is_visible():
    question = "When is a refund paid?"
    alone = index_of().search(question, 5, "bob")
    among_others = index_of(*(secret(number, "alice", "refund paid refund") for number in range(50)))
    found = among_others.search(question, 5, "bob")
    assert [passage.text for passage in found.passages] == [passage.text for passage in alone.passages]
    assert found.confidence == pytest.approx(alone.confidence, abs=0.1)


def test_with_all_tasks_of_others_are_found_without_their_ids():
    index = index_of(secret(17, "alice"))
    found = index.search("Which secret code opens the vault?", 5, "bob", of_all=True)
    assert CANARY in texts(found)
    assert "17" not in found.as_answer().replace(CANARY, "")
    assert OTHER_TASK in found.as_answer()
    assert "task 17" in texts(index.search("Which secret code opens the vault?", 5, "alice", of_all=True))


def test_deleted_tasks_of_others_do_not_lift_the_filter():
    index = index_of(*(secret(number, "bob", "nothing") for number in range(40)), secret(99, "alice"))
    with index.writing() as writer:
        for number in range(40):
            writer.delete(f"task:{number}")
        writer.commit()
    assert CANARY not in texts(index.search("Which secret code opens the vault?", 50, "bob"))
