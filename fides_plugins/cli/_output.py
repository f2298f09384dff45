"""What commands print: tables for people, JSON for machines, progress on a terminal's standard error."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table


def console(stderr: bool = False) -> Console:
    """A console made when needed, so that tests and pipes see the real streams."""
    stream = sys.stderr if stderr else sys.stdout
    # Into a file or a pipe there is no width to respect, and eighty columns would fold the tables.
    return Console(stderr=stderr, highlight=False, width=None if stream.isatty() else 120)


def print_json(value: Any) -> None:
    """One JSON document on standard output, with nothing else beside it."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


def print_table(
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    justify: Literal["left", "right"] = "right",
) -> None:
    """A table; the first column is left-aligned, the others as told (right, as numbers are)."""
    table = Table(title=title, title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else justify, overflow="fold")
    for row in rows:
        table.add_row(*row)
    console().print(table)


@contextmanager
def progress(quiet: bool = False) -> Iterator[Progress]:
    """A progress display on standard error; silent when `quiet` or when it is no terminal."""
    target = console(stderr=True)
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=target, disable=quiet or not target.is_terminal, transient=False) as bar:
        yield bar
