"""What commands read and print: files, tables for people, JSON for machines, progress on standard error.

Class names, reasons, errors and findings are written by strangers. So nothing that is printed is markup, and no
control character reaches a terminal: emphasis is the argument `style`, and a new line is a call of its own.
"""

from __future__ import annotations

import json
import math
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from fides_plugins.errors import InputError

if TYPE_CHECKING:
    from fides_plugins.serving.finding import CheckFinding

#: Seconds between two lines of progress in a pipe or a file.
TELL_EVERY_S = 10.0

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def visible(text: str) -> str:
    """The text with everything that is not printable (controls, escapes, bidirectional marks) as Python writes it."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class _PlainConsole(Console):
    def render_str(self, text: str, **options: Any) -> Text:
        """Every string that is printed, titles and cells of tables too, comes through here."""
        return super().render_str(visible(text), **{**options, "markup": False, "emoji": False})


def console(stderr: bool = False) -> Console:
    """A new console, so that tests and pipes get the streams of the moment."""
    stream = sys.stderr if stderr else sys.stdout
    # A file or a pipe has no width, and at eighty columns the tables would fold.
    return _PlainConsole(stderr=stderr, highlight=False, width=None if stream.isatty() else 120)


def print_json(value: Any) -> None:
    """One JSON document on standard output, and nothing else; ASCII, so that a terminal can show it, too."""
    typer.echo(json.dumps(value, indent=2, allow_nan=False))


def print_error(error: Exception) -> None:
    """An error on standard error; lines after the first are indented, so that none looks like the command's own."""
    print("fides: " + "\n  ".join(visible(line) for line in str(error).split("\n")), file=sys.stderr)


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


def print_findings(url: str, model: str, findings: Sequence[CheckFinding], as_json: bool) -> None:
    """What a check found. Exit status 1 if something is bad."""
    good = all(f.good is not False for f in findings)
    times = [None if math.isnan(f.seconds) else round(1000 * f.seconds, 3) for f in findings]
    if as_json:
        rows = [
            {"what": f.what, "good": f.good, "milliseconds": time, "detail": f.detail, "remedy": f.remedy}
            for f, time in zip(findings, times, strict=True)
        ]
        print_json({"model": model, "good": good, "findings": rows})
    else:
        words = {True: "good", False: "BAD", None: "unknown"}
        table = [
            (f.what, words[f.good], "" if time is None else f"{time:.1f}", f.detail)
            for f, time in zip(findings, times, strict=True)
        ]
        print_table(f"{model} at {url}", ("checked", "result", "ms", "detail"), table, "left")
        for finding in findings:
            if finding.remedy:
                console().print(f"{finding.what}: {finding.remedy}", soft_wrap=True)
    if not good:
        raise typer.Exit(1)


def read_file(path: Path) -> bytes:
    """A file's bytes, or an `InputError` that names it."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"Cannot read {path.name}: {error.strerror}.") from None


@contextmanager
def progress(quiet: bool = False) -> Iterator[Progress]:
    """A progress display on standard error, or a line every `TELL_EVERY_S` where that is no terminal."""
    target = console(stderr=True)
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    bar = Progress(*columns, console=target, disable=quiet or not target.is_terminal, transient=False)
    over = threading.Event()
    if not quiet and not target.is_terminal:
        threading.Thread(target=_tell, args=(bar, over), daemon=True).start()
    try:
        with bar:
            yield bar
    finally:
        over.set()


def _tell(bar: Progress, over: threading.Event) -> None:
    """Say every now and then what is being done, until it is over."""
    while not over.wait(TELL_EVERY_S):
        task = next((task for task in reversed(bar.tasks) if not task.finished), None)
        if task is not None:
            done = f"{task.completed:,.0f} of {task.total or 0:,.0f}, {task.elapsed or 0:.0f} s"
            bar.console.print(f"{task.description}: {done}")
