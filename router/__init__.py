"""The router's library: one noun a file, no Airflow import anywhere.

    from router import Router
    answer = await Router.from_config().answer("Why is the sky blue?")

`ls router/` is the diagram; the floors are listed in docs/architecture.md and enforced in CI.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from router.answering.router import Answer, Router

__all__ = ["Answer", "Router"]


def __getattr__(name: str) -> Any:
    # Not before somebody wants it: `import router.task` stays cheap, and knows nothing of what is above.
    if name in __all__:
        from router.answering import router as answering  # noqa: PLC0415 - see above

        return getattr(answering, name)
    raise AttributeError(f"module 'router' has no attribute {name!r}")
