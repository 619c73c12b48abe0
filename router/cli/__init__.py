"""The command line."""

from router.cli.main import main

__all__ = ["main"]
