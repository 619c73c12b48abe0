"""Turns the call log into grades and a ranking, every night."""

from typing import TYPE_CHECKING

from lazy_loader import attach

if TYPE_CHECKING:
    from router.learning.grading import Judgement as Judgement
    from router.learning.grading import against_reference as against_reference
    from router.learning.grading import check as check
    from router.learning.grading import judge_prompts as judge_prompts
    from router.learning.grading import parse_verdict as parse_verdict
    from router.learning.judging import Judged as Judged
    from router.learning.judging import judge_answers as judge_answers
    from router.learning.ranking import Placed as Placed
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
            "grading": ["Judgement", "against_reference", "check", "judge_prompts", "parse_verdict"],
            "judging": ["Judged", "judge_answers"],
            "ranking": ["Placed"],
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
