"""`fides watch`: probe a protected model and bring dead steps back."""

from __future__ import annotations

import typer

from fides_plugins.cli._hosts import add_group


def register(app: typer.Typer) -> None:
    """Add the command group to `app`."""
    add_group(app, "watch", "Probe a protected model with real inferences and bring dead steps back.")
