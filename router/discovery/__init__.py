"""Finds candidate models, tries them, and admits, promotes or retires them."""

from typing import TYPE_CHECKING

from lazy_loader import attach

if TYPE_CHECKING:
    from router.discovery.probation import Decision as Decision
    from router.discovery.probation import promote as promote
    from router.discovery.probation import retire as retire
    from router.discovery.probation import review_probation as review_probation
    from router.discovery.probation import undo_search as undo_search
    from router.discovery.search import SearchReport as SearchReport
    from router.discovery.search import run_search as run_search
else:
    __getattr__, __dir__, __all__ = attach(
        __name__,
        submod_attrs={
            "probation": ["Decision", "promote", "retire", "review_probation", "undo_search"],
            "search": ["SearchReport", "run_search"],
        },
    )
