"""The packages in examples/: their own tests pass, they install, and an installed one is found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fides_plugins.hookspecs import ENTRY_POINT_GROUP
from tests.support.command_line import fides
from tests.support.paths import REPOSITORY

PACKAGES = sorted(p.parent for p in (REPOSITORY / "examples").glob("fides-*/pyproject.toml"))


def _run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_there_are_the_four_promised_packages() -> None:
    names = {p.name for p in PACKAGES}
    assert {"fides-consensus", "fides-spotcheck", "fides-webhook", "fides-freivalds"} <= names


@pytest.mark.parametrize("package", PACKAGES, ids=lambda p: p.name)
def test_its_own_tests_pass(package: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", package / "tests"]
    done = _run(*command, PYTHONPATH=str(package / "src"))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


@pytest.mark.parametrize("package", PACKAGES, ids=lambda p: p.name)
def test_it_installs_and_is_found_by_its_entry_point(package: Path, tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation"]
    done = _run(*pip, "--target", tmp_path / "site", package)
    assert done.returncode == 0, done.stderr

    done = fides("plugins", "--json", PYTHONPATH=str(tmp_path / "site"))

    name = package.name.removeprefix("fides-")
    found = {p["name"]: p for p in json.loads(done.stdout)["plugins"]}[name]
    assert f"({package.name} 0.1.0)" in found["source"]
    assert found["hooks"]
    if name in ("consensus", "spotcheck", "webhook", "freivalds"):
        # None of them can work without its options, and each says which one it needs.
        assert found["state"] == "failed"
        assert f"plugins.options.{name}." in found["detail"]
        assert done.returncode == 1


@pytest.mark.parametrize("package", PACKAGES, ids=lambda p: p.name)
def test_its_entry_point_group_is_the_packages(package: Path) -> None:
    assert f"[project.entry-points.{ENTRY_POINT_GROUP}]" in (package / "pyproject.toml").read_text()
