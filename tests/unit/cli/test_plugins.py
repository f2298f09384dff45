"""`fides plugins`: what is loaded and why not, new packages that work as made, the contract's check."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fides_plugins.cli import app
from fides_plugins.errors import InputError, SettingsError
from fides_plugins.pipeline import Pipeline
from fides_plugins.settings import Settings
from fides_plugins.testing import fake_logits, fake_query, fake_service, make_bundle, switch_top_two
from fides_plugins.types import Prediction
from tests.support.command_line import fides
from tests.support.plugin_environments import fides_script, make_environment, new_package

GOOD = """
from fides_plugins import hookimpl

class Good:
    @hookimpl
    def fides_record(self, verdict):
        pass
"""
PLUGINS = {
    "good": GOOD,
    "unwanted": GOOD,
    "broken": "import a_module_that_is_not_there",
    "misspelt": GOOD.replace("fides_record", "fides_recrod"),
    "touchy": GOOD + "\n    @hookimpl\n    def fides_configure(self):\n        raise RuntimeError('no licence')\n",
}


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder with five installed distributions, as pip would leave them."""
    folder = tmp_path / "site"
    for name, code in PLUGINS.items():
        info = folder / f"fake_{name}-1.2.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: fake-{name}\nVersion: 1.2\n")
        (info / "entry_points.txt").write_text(f"[fides_plugins]\n{name} = fake_{name}:Good\n")
        (folder / f"fake_{name}.py").write_text(code)
    return folder


def test_the_list_says_from_where_which_hooks_and_why_not(site: Path, tmp_path: Path) -> None:
    make_bundle(tmp_path / "bundle")
    (tmp_path / "fides.toml").write_text(
        '[fides]\nbundle = "bundle"\n[fides.plugins]\nblocked = ["unwanted"]\nload = ["fake_good"]\n'
    )
    done = fides("plugins", "--settings", tmp_path / "fides.toml", "--json", PYTHONPATH=str(site))

    found = json.loads(done.stdout)
    plugins = {p["name"]: p for p in found["plugins"]}
    assert plugins["good"]["state"] == "loaded"
    assert plugins["good"]["source"] == "entry point fake_good:Good (fake-good 1.2)"
    assert plugins["good"]["hooks"] == ["fides_record"]
    assert (plugins["unwanted"]["state"], plugins["unwanted"]["detail"]) == ("blocked", "settings block it")
    assert "a_module_that_is_not_there" in plugins["broken"]["detail"]
    assert "Did you mean 'fides_record'?" in plugins["misspelt"]["detail"]
    assert plugins["touchy"]["detail"] == "RuntimeError: no licence"
    assert plugins["detector"]["source"] == "built-in"
    assert "implements no hook" in plugins["fake_good"]["detail"]
    # What was asked for and what cannot be configured stop a server; a broken bystander does not.
    assert found["stops_start"] == ["fake_good", "touchy"]
    assert found["order"]["fides_record"] == ["good"]
    assert found["order"]["fides_verify"] == ["verifier"]
    assert done.returncode == 1
    assert done.stderr == ""


def test_the_table_for_people_says_the_same(site: Path) -> None:
    done = fides("plugins", PYTHONPATH=str(site), FIDES_PLUGINS__BLOCKED="unwanted,touchy")

    assert done.returncode == 0, done.stderr
    assert "entry point fake_good:Good (fake-good 1.2)" in done.stdout
    assert "unwanted is blocked: settings block it" in done.stdout
    assert "misspelt is failed: Plug-in 'misspelt' implements 'fides_recrod'" in done.stdout
    assert "Without a bundle" in done.stdout


def test_a_required_plugin_that_is_missing_fails_the_list() -> None:
    done = fides("plugins", FIDES_PLUGINS__REQUIRED="ghost")
    assert done.returncode == 1
    assert "would not start because of: ghost" in done.stdout


ASKED = """
from fides_plugins import hookimpl

calls = []

@hookimpl
def fides_reclassify(service):
    calls.append(__name__)
"""


def test_the_order_shown_is_the_order_of_calls(
    bundle_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    calls: list[str] = []
    for name in ("asked_one", "asked_two"):
        (tmp_path / f"{name}.py").write_text(ASKED)
        monkeypatch.delitem(sys.modules, name, raising=False)
        monkeypatch.setattr(importlib.import_module(name), "calls", calls)
    path = tmp_path / "fides.toml"
    path.write_text('[fides]\nbundle = "bundle"\nmode = "correct"\nplugins.load = ["asked_one", "asked_two"]\n')
    shown = CliRunner().invoke(app, ["plugins", "--settings", str(path), "--json"])
    assert shown.exit_code == 0, shown.output
    logits = fake_logits(1)
    honest = fake_service(logits)
    lie = Prediction(switch_top_two(honest.probabilities), honest.valid)
    pipeline = Pipeline.from_settings(Settings.from_toml(path), tmp_path)
    assert pipeline.run(fake_query(logits), lie).corrected.all()
    pipeline.close()
    assert calls == ["asked_two", "asked_one"]
    assert json.loads(shown.stdout)["order"]["fides_reclassify"] == [*calls, "reclassifier"]


def _test(package: Path, python: str = sys.executable, **environment: str) -> str:
    done = subprocess.run(
        [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(package)],
        env={**os.environ, **environment}, capture_output=True, text=True, timeout=240, cwd=package,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    return done.stdout


@pytest.mark.parametrize("hook", ["verify", "detect", "reclassify", "record"])
def test_a_new_package_passes_its_own_tests_and_lint(hook: str, tmp_path: Path) -> None:
    package = new_package("fides-quiet-hours", hook, tmp_path)

    assert "passed" in _test(package, PYTHONPATH=str(package / "src"))
    rules = ["--isolated", "--select", "E,F,W,I,UP,B", "--line-length", "120"]
    for command in (["check", *rules], ["format", "--check", "--isolated", "--line-length", "120"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "."], cwd=package, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stdout
    text = "".join(p.read_text() for p in package.rglob("*") if p.is_file() and p.suffix in (".py", ".md", ".toml"))
    assert "${" not in text
    assert f"fides_{hook}" in text


def test_a_new_package_installs_and_works_in_an_environment_of_its_own(tmp_path: Path) -> None:
    """Its dependencies come from this environment, so that the test needs no network; nothing else does."""
    package = new_package("fides-quiet-hours", "detect", tmp_path)
    python = make_environment(tmp_path / "venv", package)

    shown = subprocess.run(
        [str(python), "-m", "fides_plugins.cli", "plugins", "--json"], capture_output=True, text=True, timeout=120
    )
    plugins = {p["name"]: p for p in json.loads(shown.stdout)["plugins"]}
    assert plugins["quiet-hours"]["state"] == "loaded"
    assert plugins["quiet-hours"]["hooks"] == ["fides_configure", "fides_detect"]
    assert "3 passed" in _test(package, str(python))
    # It was this environment alone that got it.
    assert "quiet-hours" not in fides("plugins", "--json").stdout


@pytest.mark.parametrize("name", ["Quiet Hours", "1st", "../up", "class", "a--b", ""])
def test_names_that_are_no_package_names_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be a package name"):
        new_package(name, "detect", tmp_path)
    assert not list(tmp_path.iterdir())


def test_unknown_hooks_and_existing_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="verify, detect, reclassify, record"):
        new_package("fides-x", "configure", tmp_path)
    new_package("fides-x", "fides_record", tmp_path)
    with pytest.raises(InputError, match="exists already"):
        new_package("fides-x", "detect", tmp_path)


def test_check_tells_good_from_broken(tmp_path: Path) -> None:
    (tmp_path / "one.py").write_text(
        GOOD + "\nclass Bad(Good):\n    @hookimpl\n    def fides_verify(self, q):\n        0\n"
    )
    good = fides("plugins", "check", "one:Good", "--classes", "2,3", "--json", PYTHONPATH=str(tmp_path))
    assert good.returncode == 0, good.stderr
    assert json.loads(good.stdout)["ok"] is True
    bad = fides("plugins", "check", "one:Bad", PYTHONPATH=str(tmp_path))
    assert bad.returncode == 1
    assert "does not fit its hook" in bad.stdout
    missing = fides("plugins", "check", "two:Good", PYTHONPATH=str(tmp_path))
    assert missing.returncode == 2
    assert missing.stderr.startswith("fides: There is no module 'two'")
    assert "Traceback" not in missing.stderr


def test_check_finds_the_current_folder_and_a_server_does_not(tmp_path: Path) -> None:
    here = tmp_path / "here"
    here.mkdir()
    make_bundle(here / "bundle")
    (here / "one.py").write_text(GOOD)
    (here / "fides.toml").write_text('[fides]\nbundle = "bundle"\n[fides.plugins]\nload = ["one:Good"]\n')
    environment = fides_script(tmp_path / "bin")

    def fides_here(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        command = ["fides", "plugins", *arguments]
        variables = {**environment, **more}
        return subprocess.run(command, cwd=here, env=variables, capture_output=True, text=True, timeout=120)

    found = fides_here("check", "one:Good", "--classes", "2")
    assert found.returncode == 0, found.stderr
    shown = fides_here("--settings", "fides.toml")
    assert shown.returncode == 1
    assert "There is no module 'one'" in shown.stdout
    assert "PYTHONPATH=." in shown.stdout
    assert fides_here("--settings", "fides.toml", PYTHONPATH=".").returncode == 0
    if sys.version_info >= (3, 11):
        assert fides_here("check", "one:Good", "--classes", "2", PYTHONSAFEPATH="1").returncode == 2


def test_check_says_when_no_answer_was_seen(tmp_path: Path) -> None:
    silent = GOOD.replace("fides_record(self, verdict)", "fides_detect(self, service)")
    (tmp_path / "silent.py").write_text(silent)
    (tmp_path / "observer.py").write_text(GOOD)
    done = fides("plugins", "check", "silent:Good", PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "Note: fides_detect: 12 calls, no answer; nothing was checked by its answers." in done.stdout
    noted = json.loads(fides("plugins", "check", "silent:Good", "--json", PYTHONPATH=str(tmp_path)).stdout)
    assert (noted["ok"], len(noted["notes"])) == (True, 1)
    assert "Note" not in fides("plugins", "check", "observer:Good", PYTHONPATH=str(tmp_path)).stdout


def test_wrong_use_is_a_settings_error() -> None:
    result = CliRunner().invoke(app, ["plugins", "check", "json", "--classes", "many"])
    assert isinstance(result.exception, SettingsError)
    assert fides("plugins", FIDES_MODDE="flag").returncode == 2
