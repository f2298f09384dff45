"""Try a handler the way a worker would, in a process of its own, before anything is written.

TorchServe does not stop for a handler that fails to load: its workers retry for minutes while `/ping`
says Healthy. So the import is tried here, with the archive unpacked, as working folder and first on the
path, exactly as in a worker. Then a handler that is a class loads its model and answers one row of zeros, because
a bundle of another model would show only at run time, as `error` in every row.

That is to run code of the archive, which may come from anywhere: see `confine.py` for what it cannot do, and
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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fides_plugins.errors import FidesError, InputError
from fides_plugins.serving.torchserve import confine
from fides_plugins.serving.torchserve.archive import MANIFEST, ModelArchive, write_folder
from fides_plugins.serving.torchserve.build import SHIM_NAME

if TYPE_CHECKING:
    from fides_plugins.serving.torchserve.judge import InferenceJudge
    from fides_plugins.serving.torchserve.original import Found

_MARK = "fides-probe:"
_TIMEOUT_S = 120.0
#: Of what the process printed, this much of the end is read.
_READ_BYTES = 64 * 1024
#: Variables that an interpreter needs; keys and tokens of the shell are none of the archive's business.
_KEPT = ("PATH", "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "CONDA_PREFIX", "LD_LIBRARY_PATH", "LANG", "LC_ALL")
#: Until the trial says otherwise.
_UNTRIED = "The handler could not be tried on a row: loading its model did not end."


def probe_archive(archive: ModelArchive, python: str | None = None) -> tuple[str, tuple[str, ...]]:
    """Unpack a protected archive and try both handlers in a new process; what the original one is, and notes on it.

    The answer is empty where this system cannot confine the process; nothing is run then.

    Raises
    ------
    InputError
        If the handler, its settings or its bundle cannot be used, with the reason that a worker would log; or if the
        bundle is for a model with other classes.
    """
    if not confine.landlock_version():
        return "", ()
    with tempfile.TemporaryDirectory(prefix="fides-probe-", ignore_cleanup_errors=True) as folder:
        root = Path(folder) / "model"
        write_folder(root, archive)
        # A program text instead of `-m`: the vendored package may be the only one the interpreter has.
        program = f"import sys; sys.path.insert(0, {str(root)!r}); import {SHIM_NAME[:-3]}; " + (
            "from fides_plugins.serving.torchserve import probe; probe.run()"
        )
        out, errors = _run([confine.__file__, folder, python or sys.executable, "-c", program], root, Path(folder))
    told: dict[str, Any] = {"note": _UNTRIED}
    try:
        for line in out:
            if line.startswith(_MARK):
                told |= json.loads(line[len(_MARK) :])
        if "error" in told:
            raise InputError(str(told["error"]))
        return str(told["description"]), (str(told["note"]),) if told["note"] else ()
    except (ValueError, KeyError, TypeError, RecursionError):
        raise InputError(
            f"The handler cannot be imported: {(errors or ['no message'])[-1]}",
            "Fix it, or name the server's Python with --python.",
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
            # Imported, but its model did not load in time: that is a note.
            if not any(line.startswith(_MARK) for line in _last_lines(paths[0])):
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
    """Runs in the new process: print what the handler of the unpacked archive in `model_dir` is, and how it fits."""
    import yaml

    from fides_plugins.serving.torchserve.handler import prepare

    try:
        whole = json.loads((Path(model_dir) / MANIFEST).read_text(encoding="utf-8"))
        manifest = whole["model"]
        config = yaml.safe_load((Path(model_dir) / manifest["configFile"]).read_text(encoding="utf-8"))
        _, judge, found, _ = prepare(config, Path(model_dir).resolve(), manifest.get("modelName", ""))
        _tell({"description": found.description})
        _tell({"note": _try(found, judge, whole, config, Path(model_dir).resolve())})
    except FidesError as error:
        _tell({"error": str(error)})
    sys.stdout.flush()
    # Threads of the handler's own would keep this process alive.
    os._exit(0)


def _tell(line: Mapping[str, str]) -> None:
    print(_MARK + json.dumps(line), flush=True)


def _try(found: Found, judge: InferenceJudge, manifest: Any, config: Any, model_dir: Path) -> str:
    """Ask the handler about one row of zeros; returns a note where that did not work.

    Raises
    ------
    InputError
        If it answered with another number of classes than the bundle has.
    """
    import numpy as np

    from fides_plugins.codec import class_rows
    from fides_plugins.serving.torchserve.original import protect
    from fides_plugins.serving.torchserve.tensors import ClassOutput

    bundle = judge.protection.bundle
    declared = bundle.manifest.input if bundle is not None else None
    if bundle is None or found.kind != "class" or declared is None or None in declared.shape[1:]:
        return ""
    zeros: Any = np.zeros((1, *(n or 1 for n in declared.shape[1:])), dtype=declared.dtype)
    if "torch" in sys.modules:
        zeros = sys.modules["torch"].from_numpy(zeros)
    step = "initialize()"
    try:
        from ts.context import Context

        original = protect(found, None)
        original.initialize(Context("", str(model_dir), manifest, 1, None, "", True, None, config))
        step = f"inference() of {declared.dtype} {tuple(zeros.shape)}, which the bundle is for,"
        output = original.instance.inference(zeros)
    except Exception as error:  # foreign code may raise anything
        return (
            f"The handler could not be tried on a row: {step} raised {type(error).__name__}. Unless it works on the "
            "server and preprocess() makes what the bundle is for, every row will be `error`."
        )
    try:
        n_classes = class_rows(ClassOutput.find(output, judge.protection.settings.output).array).shape[1]
    except FidesError as error:
        return f"No class output was found in what inference() returned: {error}"
    if n_classes != len(bundle.class_names):
        raise InputError(
            f"inference() answers with {n_classes} classes, and the bundle is for {len(bundle.class_names)}.",
            "Fit a bundle for this model.",
        )
    return ""
