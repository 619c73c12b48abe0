"""Answers one prompt within a deadline: preferred model and fallback in parallel."""

from typing import TYPE_CHECKING

from lazy_loader import attach

if TYPE_CHECKING:
    from router.answering.answer import Answer as Answer
    from router.answering.answer import Event as Event
    from router.answering.answer import EventKind as EventKind
    from router.answering.attempt import Attempt as Attempt
    from router.answering.fallback import Found as Found
    from router.answering.fallback import Knowledge as Knowledge
    from router.answering.fallback import prompt_with as prompt_with
    from router.answering.fallback import search as search
    from router.answering.plan import PASSAGES_SOURCE as PASSAGES_SOURCE
    from router.answering.plan import RoutingPlan as RoutingPlan
    from router.answering.plan import call_request as call_request
    from router.answering.policy import AttemptState as AttemptState
    from router.answering.policy import permit_patience as permit_patience
    from router.answering.router import Router as Router
    from router.answering.store import DueTask as DueTask
    from router.answering.store import RequestTask as RequestTask
    from router.answering.store import claim_due_deadlines as claim_due_deadlines
    from router.answering.store import complete_deadline as complete_deadline
    from router.answering.store import extend_deadline_claim as extend_deadline_claim
    from router.answering.task_record import RequestContext as RequestContext
    from router.answering.task_record import TaskRecord as TaskRecord
else:
    __getattr__, __dir__, __all__ = attach(
        __name__,
        submod_attrs={
            "answer": ["Answer", "Event", "EventKind"],
            "attempt": ["Attempt"],
            "fallback": ["Found", "Knowledge", "prompt_with", "search"],
            "plan": ["PASSAGES_SOURCE", "RoutingPlan", "call_request"],
            "policy": ["AttemptState", "permit_patience"],
            "router": ["Router"],
            "store": [
                "DueTask",
                "RequestTask",
                "claim_due_deadlines",
                "complete_deadline",
                "extend_deadline_claim",
            ],
            "task_record": ["RequestContext", "TaskRecord"],
        },
    )
