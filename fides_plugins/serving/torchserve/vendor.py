"""Put the package and what it needs into an archive, for servers where nothing can be installed.

Two folders, because they go to different places of `sys.path`: the package first, its dependencies last,
so that a server's own copies win. numpy is not taken along: torch's worker has it.
"""

from __future__ import annotations

import platform
import re
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import fides_plugins
from fides_plugins.errors import InputError

FOLDER = "fides_vendor"
TAG_FILE = f"{FOLDER}/TAG"

_ROOTS = ("onnxruntime", "pluggy", "pydantic", *(("tomli",) if sys.version_info < (3, 11) else ()))
_LEFT_TO_THE_SERVER = frozenset({"numpy"})
#: Parts of onnxruntime that only convert and tune models.
_UNUSED = ("onnxruntime/tools/", "onnxruntime/transformers/", "onnxruntime/quantization/", "onnxruntime/datasets/")
#: Parts of this package that no handler needs.
_UNSERVED = ("training/", "cli/", "enclave/", "client/", "testing/", "demo/", "audit/", "serving/triton/")


def tag() -> str:
    """Python version and platform that the vendored binaries are for, such as `cp311-linux-x86_64`."""
    return f"cp{sys.version_info[0]}{sys.version_info[1]}-{sys.platform}-{platform.machine()}"


def vendor_files() -> dict[str, bytes]:
    """Entries of the vendored package, by name in the archive.

    Raises
    ------
    InputError
        If a dependency is not installed here, so that it cannot be copied.
    """
    files = {TAG_FILE: f"{tag()}\n".encode()}
    root = Path(fides_plugins.__file__).parent
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if path.is_file() and "__pycache__" not in path.parts and not name.startswith(_UNSERVED):
            files[f"{FOLDER}/package/fides_plugins/{name}"] = path.read_bytes()
    for distribution in _closure():
        for file in distribution.files or ():
            name = file.as_posix()
            # Scripts lie outside of site-packages; compiled caches would be stale.
            if name.startswith(("..", "/")) or "__pycache__" in file.parts or name.startswith(_UNUSED):
                continue
            path = Path(str(distribution.locate_file(file)))
            if path.is_file():
                files[f"{FOLDER}/dependencies/{name}"] = path.read_bytes()
    return files


def _closure() -> Iterator[metadata.Distribution]:
    waiting, seen = list(_ROOTS), set(_LEFT_TO_THE_SERVER)
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            raise InputError(f"{name} is not installed here, so it cannot be vendored.", "Install it first.") from None
        yield distribution
        for requirement in distribution.requires or ():
            # What comes with an extra or another platform is not needed for serving.
            if ";" not in requirement:
                waiting.append(_normal(requirement))


def _normal(requirement: str) -> str:
    found = re.match(r"[A-Za-z0-9._-]+", requirement.strip())
    return re.sub(r"[-_.]+", "-", found.group(0)).lower() if found else ""
