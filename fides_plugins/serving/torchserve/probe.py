"""Import a handler the way a worker would, in a process of its own, before anything is written.

TorchServe does not stop for a handler that fails to load: its workers retry for minutes while `/ping`
says Healthy. So the import is tried here, with the archive unpacked, as working folder and first on the
path, exactly as in a worker.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from fides_plugins.errors import InputError
from fides_plugins.serving.torchserve.archive import MANIFEST, ModelArchive, write_folder
from fides_plugins.serving.torchserve.build import SHIM_NAME

_MARK = "fides-probe:"
_TIMEOUT_S = 120.0


def probe_archive(archive: ModelArchive, python: str | None = None) -> str:
    """Unpack a protected archive and import both handlers in a new process; returns what the original one is.

    Raises
    ------
    InputError
        If the handler, its settings or its bundle cannot be used; with the reason that a worker would log.
    """
    with tempfile.TemporaryDirectory(prefix="fides-probe-") as folder:
        root = Path(folder) / "model"
        write_folder(root, archive)
        # A program text instead of `-m`: the vendored package may be the only one the interpreter has.
        program = f"import sys; sys.path.insert(0, {str(root)!r}); import {SHIM_NAME[:-3]}; " + (
            "from fides_plugins.serving.torchserve import probe; probe.run()"
        )
        command = [python or sys.executable, "-c", program]
        env = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
        try:
            done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise InputError(f"Importing the handler took more than {_TIMEOUT_S:.0f} s.") from None
        except OSError as error:
            raise InputError(f"The interpreter {python} cannot be run: {error.strerror}.") from None
    line = next((x for x in done.stdout.splitlines() if x.startswith(_MARK)), "")
    if not line:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise InputError(
            f"The handler cannot be imported: {last}", "Fix it, or name the server's Python with --python."
        )
    answer = json.loads(line[len(_MARK) :])
    if "error" in answer:
        raise InputError(answer["error"])
    return str(answer["description"])


def run(model_dir: str = ".") -> None:
    """Runs in the new process: print what the handler of the unpacked archive in `model_dir` is."""
    import yaml

    from fides_plugins.errors import FidesError
    from fides_plugins.serving.torchserve.handler import prepare

    try:
        manifest = json.loads((Path(model_dir) / MANIFEST).read_text(encoding="utf-8"))["model"]
        config = yaml.safe_load((Path(model_dir) / manifest["configFile"]).read_text(encoding="utf-8"))
        _, _, found, _ = prepare(config, Path(model_dir).resolve(), manifest.get("modelName", ""))
        answer = {"description": found.description}
    except FidesError as error:
        answer = {"error": str(error)}
    print(_MARK + json.dumps(answer))
