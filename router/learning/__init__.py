"""Turns the call log into grades and a ranking, every night."""

from typing import TYPE_CHECKING

from lazy_loader import attach

if TYPE_CHECKING:
    from router.learning.grading import against_reference as against_reference
    from router.learning.grading import check as check
    from router.learning.judging import Judged as Judged
    from router.learning.judging import judge_answers as judge_answers
    from router.learning.pairwise import Budget as Budget
    from router.learning.pairwise import PricedModel as PricedModel
    from router.learning.pairwise import answer_of as answer_of
    from router.learning.pairwise import compare as compare
    from router.learning.pairwise import gather_or_cancel as gather_or_cancel
    from router.learning.ranking import Placed as Placed
    from router.learning.ranking import Standing as Standing
    from router.learning.retention import drop_old_calls as drop_old_calls
    from router.learning.review import RankChange as RankChange
    from router.learning.review import grade_answers as grade_answers
    from router.learning.review import order_by_evidence as order_by_evidence
    from router.learning.review import rank_models as rank_models
    from router.learning.review import run_review as run_review
    from router.learning.review import sum_evidence as sum_evidence
else:
    __getattr__, __dir__, __all__ = attach(
        __name__,
        submod_attrs={
            "grading": ["against_reference", "check"],
            "judging": ["Judged", "judge_answers"],
            "pairwise": ["Budget", "PricedModel", "answer_of", "compare", "gather_or_cancel"],
            "ranking": ["Placed", "Standing"],
            "retention": ["drop_old_calls"],
            "review": [
                "RankChange",
                "grade_answers",
                "order_by_evidence",
                "rank_models",
                "run_review",
                "sum_evidence",
            ],
        },
    )
