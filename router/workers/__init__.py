"""Drains the queue: one engine per process, one worker per model."""

from typing import TYPE_CHECKING

from lazy_loader import attach

if TYPE_CHECKING:
    from router.workers.deadlines import DeadlineJob as DeadlineJob
    from router.workers.engine import Engine as Engine
    from router.workers.runs import begin_run as begin_run
    from router.workers.runs import run_report as run_report
    from router.workers.worker import Worker as Worker
    from router.workers.worker import wait_for_work as wait_for_work
else:
    __getattr__, __dir__, __all__ = attach(
        __name__,
        submod_attrs={
            "deadlines": ["DeadlineJob"],
            "engine": ["Engine"],
            "runs": ["begin_run", "run_report"],
            "worker": ["Worker", "wait_for_work"],
        },
    )
