"""Answers one prompt within a deadline: preferred model and fallback in parallel."""

from typing import TYPE_CHECKING

from lazy_loader import attach

if TYPE_CHECKING:
    from router.answering.answer import MAX_DEADLINE_SECONDS as MAX_DEADLINE_SECONDS
    from router.answering.answer import MAX_TOKENS as MAX_TOKENS
    from router.answering.answer import Answer as Answer
    from router.answering.answer import Event as Event
    from router.answering.answer import EventKind as EventKind
    from router.answering.context import RequestContext as RequestContext
    from router.answering.due_task import answer_due_task as answer_due_task
    from router.answering.router import Router as Router
    from router.answering.store import DueTask as DueTask
    from router.answering.store import claim_due_deadlines as claim_due_deadlines
    from router.answering.store import complete_deadline as complete_deadline
    from router.answering.store import extend_deadline_claim as extend_deadline_claim
else:
    __getattr__, __dir__, __all__ = attach(
        __name__,
        submod_attrs={
            "answer": ["Answer", "Event", "EventKind", "MAX_DEADLINE_SECONDS", "MAX_TOKENS"],
            "context": ["RequestContext"],
            "due_task": ["answer_due_task"],
            "router": ["Router"],
            "store": ["DueTask", "claim_due_deadlines", "complete_deadline", "extend_deadline_claim"],
        },
    )
