"""The command line: `router`."""

from router.cli.main import main
from router.cli.output import SafeConsole
from router.cli.terminal import as_json

__all__ = ["SafeConsole", "as_json", "main"]
