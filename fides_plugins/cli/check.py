"""`fides check`: send one real inference through every step and say what is wrong."""

from __future__ import annotations

import typer

from fides_plugins.cli._hosts import add_group


def register(app: typer.Typer) -> None:
    """Add the command group to `app`."""
    add_group(app, "check", "Send one real inference through every step and say what is wrong.")
