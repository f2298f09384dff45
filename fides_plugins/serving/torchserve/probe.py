"""Import a handler the way a worker would, in a process of its own, before anything is written.

TorchServe does not stop for a handler that fails to load: its workers retry for minutes while `/ping`
says Healthy. So the import is tried here, with the archive unpacked, as working folder and first on the
path, exactly as in a worker.

To import is to run code of the archive, which may come from anywhere: see `confine.py` for what it cannot do, and
`_environment` for what it cannot see. It can read what its user can read.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import site
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from fides_plugins.errors import InputError
from fides_plugins.serving.torchserve import confine
from fides_plugins.serving.torchserve.archive import MANIFEST, ModelArchive, write_folder
from fides_plugins.serving.torchserve.build import SHIM_NAME

_MARK = "fides-probe:"
_TIMEOUT_S = 120.0
#: Of what the process printed, this much of the end is read.
_READ_BYTES = 64 * 1024
#: Variables that an interpreter needs; keys and tokens of the shell are none of the archive's business.
_KEPT = ("PATH", "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "CONDA_PREFIX", "LD_LIBRARY_PATH", "LANG", "LC_ALL")


def probe_archive(archive: ModelArchive, python: str | None = None) -> str:
    """Unpack a protected archive and import both handlers in a new process; returns what the original one is.

    The answer is empty where this system cannot confine the process; nothing is run then.

    Raises
    ------
    InputError
        If the handler, its settings or its bundle cannot be used; with the reason that a worker would log.
    """
    if not confine.landlock_version():
        return ""
    with tempfile.TemporaryDirectory(prefix="fides-probe-", ignore_cleanup_errors=True) as folder:
        root = Path(folder) / "model"
        write_folder(root, archive)
        # A program text instead of `-m`: the vendored package may be the only one the interpreter has.
        program = f"import sys; sys.path.insert(0, {str(root)!r}); import {SHIM_NAME[:-3]}; " + (
            "from fides_plugins.serving.torchserve import probe; probe.run()"
        )
        out, errors = _run([confine.__file__, folder, python or sys.executable, "-c", program], root, Path(folder))
    try:
        line = next(x for x in out if x.startswith(_MARK))
        answer = json.loads(line[len(_MARK) :])
        if "error" in answer:
            raise InputError(str(answer["error"]))
        return str(answer["description"])
    except (StopIteration, ValueError, KeyError, TypeError, RecursionError):
        last = (errors or ["no message"])[-1]
        raise InputError(
            f"The handler cannot be imported: {last}", "Fix it, or name the server's Python with --python."
        ) from None


def _run(arguments: Sequence[str], root: Path, scratch: Path) -> tuple[list[str], list[str]]:
    """Lines of standard output and standard error, which go into files, so that no flood of them fills the memory."""
    paths = scratch / "out", scratch / "errors"
    with paths[0].open("wb") as out, paths[1].open("wb") as errors:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=root,
            env=_environment(scratch),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=errors,
            start_new_session=True,
        )
        try:
            process.wait(_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise InputError(
                f"Importing the handler took more than {_TIMEOUT_S:.0f} s.",
                "Find out what it does at import, or skip the check with --skip-import-check.",
            ) from None
        finally:
            # What it started ends with it; what made a session of its own stays confined.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return _last_lines(paths[0]), _last_lines(paths[1])


def _last_lines(path: Path) -> list[str]:
    with path.open("rb") as stream:
        stream.seek(max(0, path.stat().st_size - _READ_BYTES))
        return stream.read().decode("utf-8", "replace").strip().splitlines()


def _environment(scratch: Path) -> dict[str, str]:
    kept = {name: os.environ[name] for name in _KEPT if name in os.environ}
    # Packages that the user installed for himself are found without his home.
    own = {"HOME": str(scratch), "TMPDIR": str(scratch), "PYTHONUSERBASE": site.getuserbase()}
    return {**kept, **own, "PYTHONDONTWRITEBYTECODE": "1"}


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
