"""`fides reset`: withdraw the service alarm after an incident."""

from __future__ import annotations

import typer

from fides_plugins.cli._hosts import add_group


def register(app: typer.Typer) -> None:
    """Add the command group to `app`."""
    add_group(app, "reset", "Withdraw the service alarm after an incident.")
