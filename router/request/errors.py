"""Error of an invalid or unsupported request."""

from __future__ import annotations

from router.errors import InputError


class RequestError(InputError):
    """A request is invalid; `param` is the path of the value in it, as in `messages.[1].tool_calls`.

    `unsupported`: the value is valid, but the router, the backend or the model cannot do it.
    """

    def __init__(self, message: str, param: str | None = None, *, unsupported: bool = False) -> None:
        super().__init__(message)
        self.param = param
        self.unsupported = unsupported


class UnstorableRequestError(RequestError):
    """A request contains a text or number that cannot be stored or sent."""
