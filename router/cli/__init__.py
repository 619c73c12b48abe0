"""The command line: `router`."""

from router.cli.main import main
from router.cli.terminal import as_json

__all__ = ["as_json", "main"]
