"""Requests to models: reads and validates OpenAI-compatible bodies, for every entrance alike."""

from lazy_loader import attach_stub

# The public names are listed in __init__.pyi.
__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
