"""Runs the command line: `python -m router.cli`."""

from router.cli.main import main

main()
