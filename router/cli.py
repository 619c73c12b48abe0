"""The command line: `router`."""

from __future__ import annotations

import typer

from router.database import connect, migrate as migrate_schema
from router.roster import sync_roster
from router.settings import addresses_from_environment, load_config

app = typer.Typer(no_args_is_help=True)


@app.callback()
def _root() -> None:
    """Solve LLM prompts at scale and under control."""


@app.command()
def migrate() -> None:
    """Bring the schema up to date and carry config/models.yaml over."""
    url = addresses_from_environment().database_url
    report = migrate_schema(url)
    with connect(url) as connection:
        sync_roster(connection, load_config())
    typer.echo(f"applied: {', '.join(report.applied) or 'nothing new'}; tasks queued: {report.tasks_queued}")


def main() -> None:
    """Entry point."""
    app()


if __name__ == "__main__":
    main()
