"""Answers one prompt within a deadline: preferred model and fallback in parallel."""

from lazy_loader import attach_stub

# The public names are listed in __init__.pyi.
__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
