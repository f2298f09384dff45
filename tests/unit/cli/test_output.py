"""What a stranger wrote is shown as text: no markup, no control character, no line of its own."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from rich.text import Text
from typer.testing import CliRunner

from fides_plugins.cli import app
from fides_plugins.cli._output import console, print_json, print_table, progress, visible
from fides_plugins.cli.triton import print_event
from fides_plugins.serving.triton.operator.watch import Event
from fides_plugins.testing import make_bundle
from tests.support.command_line import fides
from tests.support.paths import REPOSITORY

HOSTILE = [
    "[/red]",
    "[bold green]status trusted[/bold green]",
    "[link=https://example.org]here[/link]",
    ":skull:",
    "\x1b[2J\x1b[1;32mtrusted\x1b[0m",
    "\x9b2J",
    "\a\b\x7f",
    "\r\n\n| trusted |",
    "cat\u202egnp.exe",
    "\ud800",
]


def is_harmless(shown: str) -> bool:
    return "\x1b" not in shown and all(c.isprintable() or c == "\n" for c in shown)


@pytest.mark.parametrize("text", HOSTILE)
def test_a_line_and_a_table_show_it_as_text(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    console().print(f"Said: {text}", soft_wrap=True)
    print_table(text, (text,), [(text,)])
    with progress() as bar:
        bar.add_task(text)
    shown = capsys.readouterr().out
    assert is_harmless(shown)
    assert shown.startswith(f"Said: {visible(text)}\n")
    # The title, the heading and the cell: nothing was taken for markup, and nothing made a line of its own.
    assert shown.count(visible(text)) == 4
    assert len(shown.splitlines()) == 7


def test_what_is_printable_stays_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    console().print("Größe 10 µm, 数字, [0.1, 0.2]")
    console().print(Text("our own\nlines", "bold"))
    assert capsys.readouterr().out == "Größe 10 µm, 数字, [0.1, 0.2]\nour own\nlines\n"


@pytest.mark.parametrize("text", HOSTILE)
def test_json_is_ascii(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"reason": text})
    out = capsys.readouterr().out
    assert out.isascii()
    assert is_harmless(out)
    assert json.loads(out)["reason"] == text


@pytest.mark.parametrize("text", HOSTILE[:-1])
def test_inspect_shows_hostile_class_names(tmp_path: Path, text: str) -> None:
    make_bundle(tmp_path / "bundle", 2, class_names=(text, "other"))
    result = CliRunner().invoke(app, ["inspect", str(tmp_path / "bundle")])
    assert result.exit_code == 0, result.exception
    assert is_harmless(result.stdout)
    assert visible(text) in result.stdout


@contextmanager
def host(says: str) -> Iterator[str]:
    """A server that answers one request with an error of its own wording."""
    body = json.dumps({"error": says}).encode()
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def speak() -> None:
            connection = listening.accept()[0]
            with connection:
                connection.recv(65536)
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: %d\r\n\r\n" % len(body) + body)

        thread = threading.Thread(target=speak, daemon=True)
        thread.start()
        yield f"127.0.0.1:{listening.getsockname()[1]}"


@pytest.mark.parametrize("text", HOSTILE)
def test_an_error_in_a_hosts_words_is_one_message(text: str) -> None:
    with host(text) as address:
        done = fides("reset", "triton", address, "digits")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert is_harmless(done.stderr)
    first, *more = done.stderr.splitlines()
    assert first.startswith("fides: ")
    # Whatever follows is indented: no line of the host's own looks like one of the command's.
    assert all(line.startswith("  ") for line in more)


@pytest.mark.parametrize("text", HOSTILE)
def test_an_event_of_a_watched_server_is_one_line(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    print_event(Event("dead", "digits", 0.1, text), as_json=False)
    shown = capsys.readouterr().out
    assert is_harmless(shown)
    assert shown.endswith(f" {visible(text)}\n")
    assert len(shown.splitlines()) == 1


def test_every_command_prints_through_one_console() -> None:
    for file in (REPOSITORY / "fides_plugins" / "cli").glob("*.py"):
        text = file.read_text()
        assert file.name == "_output.py" or "Console(" not in text, file.name
        assert "[/" not in text, f"{file.name} uses markup"


def test_long_work_is_told_line_by_line_where_there_is_no_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fides_plugins.cli._output.TELL_EVERY_S", 0.05)
    with progress() as bar:
        task = bar.add_task("distil", total=100)
        bar.update(task, completed=40)
        time.sleep(0.3)
    told = capsys.readouterr().err.splitlines()
    assert len(told) >= 2
    assert told[0].startswith("distil: 40 of 100, ")
    with progress(quiet=True) as bar:
        bar.add_task("distil", total=100)
        time.sleep(0.2)
    assert capsys.readouterr().err == ""
