"""Python environments of their own for plug-in packages, made without a network."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

from typer.testing import CliRunner

from fides_plugins.cli import app
from tests.support.paths import REPOSITORY


def make_environment(home: Path, *packages: Path) -> Path:
    """A virtual environment in `home` with `packages` installed; its interpreter.

    What the packages need comes from the environment that runs the tests; the packages themselves are
    installed by pip into the new one alone.
    """
    venv.create(home, with_pip=False)
    python = home / "bin" / "python"
    (site,) = home.glob("lib/python*/site-packages")
    outside = sysconfig.get_path("purelib")
    # A line with `import` is run, so that the other folder's own .pth files count as well.
    (site / "outside.pth").write_text(f"import site; site.addsitedir({outside!r})\n")
    install(python, *packages)
    return python


def new_package(name: str, hook: str, into: Path) -> Path:
    """The folder of a package that `fides plugins new` made; the command's error where it makes none."""
    done = CliRunner().invoke(app, ["plugins", "new", "--hook", hook, "--into", str(into), "--", name])
    if done.exception is not None:
        raise done.exception
    (folder,) = into.glob(name)
    return folder


def install(python: Path, *packages: Path) -> None:
    """Install packages, or install them again after a change."""
    pip = [str(python), "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--force-reinstall"]
    done = subprocess.run([*pip, *map(str, packages)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr


def fides_script(folder: Path) -> dict[str, str]:
    """Environment variables under which a shell finds `fides`, as pip installs it, over the code under test.

    Unlike `python -m`, the script does not put the current folder on Python's path.
    """
    script = folder / "fides"
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["import sys", f"sys.path.insert(0, {str(REPOSITORY)!r})", "from fides_plugins.cli import main", "main()"]
    script.write_text("\n".join([f"#!{sys.executable}", *lines, ""]))
    script.chmod(0o755)
    kept = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return {**kept, "COLUMNS": "160", "PATH": os.pathsep.join([str(folder), os.environ.get("PATH", "")])}


def search_path(python: Path) -> dict[str, str]:
    """Environment variables under which Triton's python backend takes its packages from that environment.

    The backend embeds Python, looks for `python3` on PATH, and does not read PYTHONPATH.
    """
    return {"PATH": os.pathsep.join([str(python.parent), os.environ.get("PATH", "")])}
