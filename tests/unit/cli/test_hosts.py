"""Model servers of the five command groups, as they are installed, and what their checks print."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from fides_plugins.cli import hosts
from fides_plugins.cli._output import print_findings
from fides_plugins.errors import PluginError
from fides_plugins.serving.finding import CheckFinding
from tests.support.docs_blocks import REPOSITORY

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

GOOD = """
def register_attach(app):
    @app.command("{name}")
    def attach(model: str):
        "Protect MODEL."
        print("attached", model)
"""
PACKAGES = {
    "good": ("good", GOOD.format(name="good")),
    "broken": ("broken", "import a_module_that_is_not_there"),
    "misnamed": ("misnamed", GOOD.format(name="good")),
    "raises": ("raises", "def register_attach(app):\n    raise RuntimeError('no\\nlicence')\n"),
    "first": ("doubled", GOOD.format(name="doubled")),
    "second": ("doubled", GOOD.format(name="doubled")),
}


@pytest.fixture
def app(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> typer.Typer:
    """The five groups, with the packages above installed as pip would leave them."""
    for package, (host, code) in PACKAGES.items():
        info = tmp_path / f"fake_{package}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: fake-{package}\nVersion: 1.2\n")
        (info / "entry_points.txt").write_text(f"[{hosts.ENTRY_POINT_GROUP}]\n{host} = fake_{package}\n")
        (tmp_path / f"fake_{package}.py").write_text(code)
        monkeypatch.delitem(sys.modules, f"fake_{package}", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    made = typer.Typer()
    hosts.register(made)
    made.command("other")(lambda: print("something else"))
    return made


def run(app: typer.Typer, *arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def test_the_built_in_servers_are_registered_like_any_other() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    registered = project["entry-points"][hosts.ENTRY_POINT_GROUP]
    for group, names in {"attach": {"triton", "torchserve"}, "watch": {"triton"}, "reset": {"triton"}}.items():
        assert {n for n in hosts.host_commands(group) if n in registered} == names, "install the package again"


def test_an_installed_package_adds_a_server(app: typer.Typer) -> None:
    assert run(app, "attach", "good", "digits").output == "attached digits\n"
    assert "No such command 'good'" in run(app, "reset", "good", "digits").output


def test_one_bad_package_does_not_break_the_others(app: typer.Typer) -> None:
    shown = run(app, "attach", "--help")
    assert shown.exit_code == 0
    for name in ("good", "broken", "doubled", "misnamed", "raises"):
        assert name in shown.output


@pytest.mark.parametrize(
    ("host", "text"),
    [
        (
            "broken",
            "The model server 'broken' of fake-broken 1.2 cannot be loaded: ModuleNotFoundError: "
            "No module named 'a_module_that_is_not_there'. Fix the package, or uninstall it.",
        ),
        (
            "raises",
            "The model server 'raises' of fake-raises 1.2 cannot be loaded: RuntimeError: no licence. "
            "Fix the package, or uninstall it.",
        ),
        (
            "doubled",
            "The model server 'doubled' comes from fake-first 1.2 and fake-second 1.2. Uninstall all but one.",
        ),
        (
            "misnamed",
            "The model server 'misnamed' of fake-misnamed 1.2 adds ['good'] to `fides attach`. "
            "It must add one command, called 'misnamed'.",
        ),
    ],
)
@pytest.mark.parametrize("arguments", [(), ("digits", "--bundle", "b"), ("--help",)])
def test_a_server_that_cannot_be_used_says_why(
    app: typer.Typer, host: str, text: str, arguments: tuple[str, ...]
) -> None:
    error = run(app, "attach", host, *arguments).exception
    assert isinstance(error, PluginError)
    assert str(error) == text


def test_no_other_command_imports_a_server(app: typer.Typer) -> None:
    assert run(app, "--help").exit_code == 0
    assert run(app, "other").output == "something else\n"
    assert not [m for m in sys.modules if m.startswith("fake_")]


FINDINGS = [
    CheckFinding("server", True, "ready"),
    CheckFinding("metrics", None, "cannot be reached", "Give [their] address."),
    CheckFinding("inference", True, "HTTP 200", seconds=0.0123),
]
BAD = CheckFinding("verdict", False, "not protected", "Run attach.")


@pytest.mark.parametrize(("findings", "code"), [(FINDINGS, 0), ([*FINDINGS, BAD], 1)])
def test_findings_are_shown_alike_and_only_what_is_bad_fails(
    findings: list[CheckFinding], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    for as_json in (False, True):
        if code:
            with pytest.raises(typer.Exit):
                print_findings("localhost:8000", "digits", findings, as_json)
        else:
            print_findings("localhost:8000", "digits", findings, as_json)
    table, _, document = capsys.readouterr().out.partition("{")
    assert "12.3" in table
    assert "unknown" in table
    assert "metrics: Give [their] address." in table
    assert ("verdict: Run attach." in table) == bool(code)
    shown = json.loads("{" + document)
    assert shown["good"] is not bool(code)
    assert [f["good"] for f in shown["findings"]] == [f.good for f in findings]
    assert [f["milliseconds"] for f in shown["findings"]][:3] == [None, None, 12.3]
