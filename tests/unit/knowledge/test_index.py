"""The index: matching, ranking, confidence, and quality on real collections."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from router.knowledge.chunking import Entry, task_entry
from router.knowledge.evaluation import evaluate_retrieval, read_collection
from router.knowledge.index import MAX_POSTINGS, KnowledgeIndex, KnowledgeIndexError, without_common_terms
from router.knowledge.relevance import tokenize

NOTES = {
    "pause": "A model is paused by setting its traffic target to zero.",
    "export": "Answers are exported as JSON lines, one object a task.",
    "redis": "While Redis is away nothing is sent to any model.",
    "solve": "Solving a task takes one call to one model.",
    "german": "Das Modell wird angehalten, indem man das Ziel auf null setzt.",
    "chinese": "将流量目标设为零即可暂停模型。",
}


def index_of(notes: dict[str, str], folder: Path | None = None) -> KnowledgeIndex:
    index = KnowledgeIndex(folder)
    with index.writing() as writer:
        for key, text in notes.items():
            writer.add(Entry(key, key, "", text))
        writer.commit()
    return index


@pytest.fixture(scope="module")
def index() -> KnowledgeIndex:
    return index_of(NOTES)


def first(index: KnowledgeIndex, question: str) -> str:
    passages = index.search(question, 3).passages
    return passages[0].source if passages else ""


@pytest.mark.parametrize(
    ("question", "source"),
    [
        ("How do I pause a model?", "pause"),
        ("solved tasks", "solve"),  # by stem
        ("exporting an answer", "export"),
        ("ANHALTEN DES MODELLS", "german"),  # by head
        ("暂停模型", "chinese"),
    ],
)
def test_best_entry_comes_first(index: KnowledgeIndex, question: str, source: str):
    assert first(index, question) == source


@pytest.mark.parametrize(
    "question",
    [
        "",
        "   ",
        "?!",
        "the of and",
        "\x00\x07",
        "\ud800",
        "zebra",
        '") OR 1=1 --',
        "AND OR NOT",
        "a" * 100_000,
    ],
)
def test_query_without_known_words_finds_nothing(index: KnowledgeIndex, question: str):
    found = index.search(question, 5)
    assert found.passages == ()
    assert found.confidence == 0


def test_unknown_words_do_not_displace_known_ones(index: KnowledgeIndex):
    unknown = " ".join(f"unknown{number}" for number in range(500))
    assert first(index, f"{unknown} when redis is away") == "redis"


def test_common_terms_are_dropped_unless_there_are_no_others():
    rare, common, commoner, unknown = (("stems", word) for word in ("rare", "common", "commoner", "unknown"))
    some = MAX_POSTINGS - 1
    frequencies = {commoner: 2 * some, common: some, unknown: 0, rare: 10}
    assert without_common_terms(frequencies) == {unknown: 0, rare: 10}
    assert without_common_terms({commoner: 2 * some, unknown: 0, common: some}) == {unknown: 0, common: some}
    assert without_common_terms({commoner: 2 * some, unknown: 0}) == {unknown: 0, commoner: 2 * some}


def test_only_the_beginning_of_a_huge_prompt_is_searched_for(index: KnowledgeIndex):
    began = time.perf_counter()
    assert first(index, "redis is away " + "model call task " * 700_000) in {"redis", "solve"}
    assert time.perf_counter() - began < 1


def test_answerable_question_has_higher_confidence_than_a_foreign_one(index: KnowledgeIndex):
    sure = index.search("How is a model paused by its traffic target?", 3).confidence
    unsure = index.search("What did the model wear in Paris on the runway last summer?", 3).confidence
    assert sure > 0.8
    assert unsure < 0.3


def test_word_that_a_long_question_repeats_counts_more():
    index = index_of({"cats": "Cats sleep in boxes.", "dogs": "Dogs sleep in houses."})
    question = "dogs, and then cats: why do cats, unlike others, hide? I mean cats."
    assert first(index, question) == "cats"
    assert first(index, question.replace("cats", "dogs")) == "dogs"


def test_more_shared_words_are_more_evidence(index: KnowledgeIndex):
    questions = (
        "model",
        "pausing a model",
        "pausing a model by its target",
        "pausing a model by its traffic target",
    )
    found = [index.rank(question, 1)[1].amount for question in questions]
    assert found == sorted(found)
    assert len(set(found)) == len(found)
    assert index.rank("model model model", 1)[1].amount == found[0]


def test_equal_texts_are_merged():
    index = index_of({"a": "Cats purr.", "b": "Cats purr.", "c": "Cats sleep."})
    assert sorted(passage.text for passage in index.search("cats", 5).passages) == [
        "Cats purr.",
        "Cats sleep.",
    ]


def test_entries_of_a_key_are_deleted_together(tmp_path: Path):
    index = index_of(NOTES, tmp_path)
    with index.writing() as writer:
        writer.delete("pause")
        writer.commit()
    assert len(index) == len(NOTES) - 1
    assert first(index, "paused by traffic") != "pause"


def test_uncommitted_changes_are_discarded(tmp_path: Path):
    index = index_of(NOTES, tmp_path)
    with index.writing() as writer:
        writer.delete_all()
    assert len(index) == len(NOTES)


def test_commit_is_visible_after_reload_and_there_is_one_writer(tmp_path: Path):
    index = index_of(NOTES, tmp_path)
    other = KnowledgeIndex(tmp_path)
    with index.writing() as writer:
        with pytest.raises(KnowledgeIndexError), other.writing():
            pass
        writer.add(Entry("new", "new", "", "Zebras are striped."))
        writer.commit()
    assert first(other, "zebra") == ""
    other.reload()
    assert first(other, "zebra") == "new"


def test_broken_index_is_reported(tmp_path: Path):
    index_of(NOTES, tmp_path)
    (tmp_path / "meta.json").write_text("{")
    with pytest.raises(KnowledgeIndexError, match="knowledge index failed"):
        KnowledgeIndex(tmp_path)


def test_tasks_are_found_by_id():
    index = KnowledgeIndex()
    with index.writing() as writer:
        for number in (3, 9, 7, -5):
            writer.add(task_entry(number, f"question {number}", "an answer"))
        writer.add(Entry("file:a", "a", "", "question of a file"))
        writer.commit()
    assert index.task_owners(3, 8).keys() == {3, 7}
    assert index.task_owners(100, 200).keys() == set()
    assert index.oldest_tasks(2) == [-5, 3]


def test_threads_can_search_concurrently(index: KnowledgeIndex):
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda _: first(index, "How do I pause a model?"), range(400)))
    assert set(found) == {"pause"}


def test_tokens_of_a_text():
    tokens = tokenize("The solving of Differential-equations")
    assert tokens.words == ("solving", "differential", "equations")
    assert tokens.heads == ["solvin", "differ", "equati"]
    assert tokens.pairs == ["solvin_differ", "differ_equati"]


@pytest.mark.parametrize(("name", "at_1", "at_5"), [("xquad_en", 0.94, 0.985), ("cranfield", 0.75, 0.89)])
def test_quality_on_real_collections_exceeds_plain_bm25(
    shared_data: Path, name: str, at_1: float, at_5: float
):
    """hit@1 of BM25 on plain words: .927 and .702; combined with static embeddings: .941 and .720."""
    report = evaluate_retrieval(read_collection(shared_data / "retrieval" / name))
    assert report.hit_at_1 >= at_1
    assert report.hit_at_5 >= at_5
