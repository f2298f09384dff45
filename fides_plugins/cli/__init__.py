"""The command `fides`. Each command is one module with a `register` function.

Exit status: 0 if all is well, 1 if what was checked failed, 2 for wrong use or unusable input.
"""

from __future__ import annotations

import importlib
import os
import sys

import typer

from fides_plugins import __version__
from fides_plugins.cli._output import print_error
from fides_plugins.errors import FidesError

#: Modules of this package, in the order of `fides --help`. Their module-level imports stay light.
COMMANDS: tuple[str, ...] = (
    "demo",
    "fit",
    "evaluate",
    "inspect",
    "plugins",
    "evidence",
    "serve_verifier",
    "infer",
    "hosts",
    "audit",
)

app = typer.Typer(
    name="fides",
    help="Check the answers of machine-learning services that run on machines you don't control.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=True,
)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"fides {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Show the version."),
) -> None:
    """Options that come before a command."""


for _name in COMMANDS:
    importlib.import_module(f"fides_plugins.cli.{_name}").register(app)


def main() -> None:
    """Entry point: a `FidesError` becomes one line on standard error and exit status 2."""
    # Before torch is imported: its idle threads would otherwise spin, and on a busy machine of few cores small
    # nets then train more slowly on two threads than on one.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        app()
    except FidesError as error:
        print_error(error)
        sys.exit(2)
