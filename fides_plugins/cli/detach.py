"""`fides detach`: remove exactly what attach wrote."""

from __future__ import annotations

import typer

from fides_plugins.cli._hosts import add_group


def register(app: typer.Typer) -> None:
    """Add the command group to `app`."""
    add_group(app, "detach", "Remove exactly what attach wrote.")
