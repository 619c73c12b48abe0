"""Status report: tasks by state, usage and errors of each model, and why nothing is sent."""

from lazy_loader import attach_stub

# The public names are listed in __init__.pyi.
__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
