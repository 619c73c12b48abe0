"""Admits calls to a model: exact rolling windows of requests and tokens, concurrency, circuit breaker."""

from lazy_loader import attach_stub

# The public names are listed in __init__.pyi.
__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
