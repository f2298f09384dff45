"""Write model archives from Python, as `torch-model-archiver` does; for the demo, the tests and the benchmarks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path

from fides_plugins.serving.torchserve.archive import MANIFEST, Entry, ModelArchive, write_archive
from fides_plugins.serving.torchserve.options import BUNDLE_FOLDER

CONFIG_NAME = "model-config.yaml"
SHIM_NAME = "fides_handler.py"


def build_archive(
    path: str | Path,
    handler: str,
    files: Mapping[str, bytes | str],
    *,
    config: str = "",
    serialized_file: str = "",
) -> Path:
    """Write a `.mar`, in one step; what is there already is replaced.

    Parameters
    ----------
    path:
        Where it goes; its stem is the model's name.
    handler:
        As in the manifest: a file among `files`, or the name of a built-in.
    files:
        Name in the archive to contents.
    config:
        Text of model-config.yaml; none is written when empty.
    serialized_file:
        Name of the weights among `files`, for handlers that load them.
    """
    target = Path(path)
    model = {"modelName": target.stem, "handler": handler, "modelVersion": "1.0"}
    if serialized_file:
        model["serializedFile"] = serialized_file
    contents = dict(files)
    if config:
        contents[CONFIG_NAME] = config
        model["configFile"] = CONFIG_NAME
    contents[MANIFEST] = json.dumps({"runtime": "python", "model": model, "archiverVersion": "0.12.0"}, indent=2)
    entries = [Entry.new(name, c.encode() if isinstance(c, str) else c) for name, c in contents.items()]
    write_archive(target, ModelArchive("mar", "", tuple(entries)), force=True)
    return target


def bundle_files(bundle: str | Path, folder: str = BUNDLE_FOLDER) -> dict[str, bytes]:
    """Entries that put a bundle into an archive, under `folder`."""
    root = Path(bundle)
    return {
        f"{folder}/{path.relative_to(root).as_posix()}": path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def shim() -> str:
    """Source of the handler module that goes into an archive."""
    return resources.files(__package__).joinpath("shim.py").read_text(encoding="utf-8")
