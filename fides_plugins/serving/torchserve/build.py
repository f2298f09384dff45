"""Write model archives from Python: what `torch-model-archiver` does, without its temporary folder.

For the demo, the tests and the benchmarks. A `.mar` is a zip with `MAR-INF/MANIFEST.json`.
"""

from __future__ import annotations

import json
import os
import tempfile
import zipfile
from collections.abc import Mapping
from importlib import resources
from pathlib import Path

from fides_plugins.serving.torchserve.options import BUNDLE_FOLDER

MANIFEST = "MAR-INF/MANIFEST.json"
CONFIG_NAME = "model-config.yaml"
SHIM_NAME = "fides_handler.py"
#: Archives are reproducible: every entry made here has the earliest time that a zip can hold.
ZIP_EPOCH = (1980, 1, 1, 0, 0, 0)


def build_archive(
    path: str | Path,
    handler: str,
    files: Mapping[str, bytes | str],
    *,
    name: str = "",
    config: str = "",
    serialized_file: str = "",
    version: str = "1.0",
) -> Path:
    """Write a `.mar`, in one step.

    Parameters
    ----------
    path:
        Where it goes; its stem is the model's name unless `name` is given.
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
    model = {"modelName": name or target.stem, "handler": handler, "modelVersion": version}
    if serialized_file:
        model["serializedFile"] = serialized_file
    entries = dict(files)
    if config:
        entries[CONFIG_NAME] = config
        model["configFile"] = CONFIG_NAME
    entries[MANIFEST] = json.dumps({"runtime": "python", "model": model, "archiverVersion": "0.12.0"}, indent=2)
    with tempfile.NamedTemporaryFile(dir=target.parent, prefix=f".{target.name}.", delete=False) as staging:
        try:
            with zipfile.ZipFile(staging, "w", zipfile.ZIP_DEFLATED) as archive:
                for entry, content in entries.items():
                    info = zipfile.ZipInfo(entry, ZIP_EPOCH)
                    info.compress_type = zipfile.ZIP_DEFLATED
                    info.external_attr = 0o644 << 16
                    archive.writestr(info, content)
            os.chmod(staging.name, 0o644)
            os.replace(staging.name, target)
        except BaseException:
            os.unlink(staging.name)
            raise
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
