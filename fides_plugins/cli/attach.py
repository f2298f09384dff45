"""`fides attach`: protect a model that is already served, by new files alone."""

from __future__ import annotations

import typer

from fides_plugins.cli._hosts import add_group


def register(app: typer.Typer) -> None:
    """Add the command group to `app`."""
    add_group(app, "attach", "Protect a model that is already served; nothing that exists is edited.")
