"""The router's library: answers, queue, limiter, learning; it never imports Airflow.

    from router import Router
    answer = await Router.from_config().answer("Why is the sky blue?")

`ls router/` is the architecture; the import rules are in pyproject.toml.
"""

import logging
from typing import TYPE_CHECKING

from lazy_loader import attach

from router.errors import PrintableRecords

if TYPE_CHECKING:
    from router.answering import Answer as Answer
    from router.answering import Router as Router
else:
    __getattr__, __dir__, __all__ = attach(
        __name__,
        submod_attrs={
            "answering": ["Answer", "Router"],
        },
    )

logging.getLogger("router").addHandler(PrintableRecords())
