"""Writes the package of `fides plugins new` from the templates beside this module."""

from __future__ import annotations

import keyword
import re
from importlib import resources
from pathlib import Path
from string import Template

from fides_plugins import __version__
from fides_plugins.errors import InputError

HOOKS = ("verify", "detect", "reclassify", "record")
_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")


def write_package(name: str, hook: str, into: Path) -> Path:
    """Write the package `name` with an implementation of `hook` into a new folder below `into`.

    Returns
    -------
    The new folder.

    Raises
    ------
    InputError
        If the name is no package name, the hook is unknown, or the folder exists.
    """
    distribution = name.replace("_", "-").lower()
    if not _NAME.fullmatch(distribution) or keyword.iskeyword(distribution):
        raise InputError(f"{name!r} cannot be a package name.", "Use lower-case words and hyphens: fides-quiet-hours.")
    chosen = hook.removeprefix("fides_")
    if chosen not in HOOKS:
        raise InputError(f"{hook!r} is no hook that a new package can start from.", f"Use one of: {', '.join(HOOKS)}.")
    folder = into / distribution
    if folder.exists():
        raise InputError(f"{folder} exists already.", "Choose another name or folder.")
    plugin = distribution.removeprefix("fides-")
    module = distribution.replace("-", "_")
    values = {
        "distribution": distribution,
        "module": module,
        "plugin": plugin,
        "class_name": "".join(part.capitalize() for part in plugin.split("-")),
        "hook": f"fides_{chosen}",
        # This release's hooks; added arguments do not break a plug-in, so no upper bound.
        "fides_version": __version__,
    }
    files = {
        "pyproject.toml": "pyproject.toml",
        "README.md": "README.md",
        f"src/{module}/__init__.py": f"{chosen}.py",
        f"src/{module}/py.typed": "",
        f"tests/test_{module}.py": f"test_{chosen}.py",
    }
    for path, template in files.items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(_render(template, values) if template else "", encoding="utf-8")
    return folder


def _render(template: str, values: dict[str, str]) -> str:
    source = resources.files("fides_plugins.cli") / "templates" / f"{template}.tmpl"
    return Template(source.read_text(encoding="utf-8")).substitute(values)
