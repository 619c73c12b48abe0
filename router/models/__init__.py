"""Which models are in use, what each may be sent, and how one is called under a permit."""

from lazy_loader import attach_stub

# The public names are listed in __init__.pyi.
__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
