"""The OpenAI-compatible HTTP API in front of `Router`."""

from typing import TYPE_CHECKING

from lazy_loader import attach

if TYPE_CHECKING:
    from router.server.api_keys import ENVIRONMENT_CLIENT as ENVIRONMENT_CLIENT
    from router.server.api_keys import ApiKeys as ApiKeys
    from router.server.api_keys import add_key as add_key
    from router.server.api_keys import read_keys as read_keys
    from router.server.api_keys import remove_key as remove_key
    from router.server.middleware import Limits as Limits
    from router.server.server import ServeOptions as ServeOptions
    from router.server.server import run_server as run_server
else:
    __getattr__, __dir__, __all__ = attach(
        __name__,
        submod_attrs={
            "api_keys": ["ApiKeys", "ENVIRONMENT_CLIENT", "add_key", "read_keys", "remove_key"],
            "middleware": ["Limits"],
            "server": ["ServeOptions", "run_server"],
        },
    )
