"""The seam by which a model server adds its sub-commands to `fides attach`, `detach`, `check`, `watch` and `reset`.

A host is one module of this package, named in `HOSTS`, with any of the functions `register_attach`,
`register_detach`, `register_check`, `register_watch` and `register_reset`. Each takes the Typer
sub-application and adds one command to it, named like the server (`triton`, `torchserve`).
"""

from __future__ import annotations

import importlib

import typer

HOSTS: tuple[str, ...] = ("triton", "torchserve")


def add_group(app: typer.Typer, name: str, help_text: str) -> None:
    """Add the group `name` to `app`, with the sub-command of every host that has one."""
    group = typer.Typer(help=help_text, no_args_is_help=True)
    for host in HOSTS:
        module = importlib.import_module(f"fides_plugins.cli.{host}")
        register = getattr(module, f"register_{name}", None)
        if register is not None:
            register(group)
    app.add_typer(group, name=name)
