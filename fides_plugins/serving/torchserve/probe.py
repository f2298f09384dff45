"""Try a handler the way a worker would, in a process of its own, before anything is written.

TorchServe does not stop for a handler that fails to load: its workers retry for minutes while `/ping`
says Healthy. So the import is tried here, with the archive unpacked, as working folder and first on the
path, exactly as in a worker. Then a handler that is a class loads its model and answers one row of zeros, because
a bundle of another model would show only at run time, as `error` in every row.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fides_plugins.errors import FidesError, InputError
from fides_plugins.serving.torchserve.archive import MANIFEST, ModelArchive, write_folder
from fides_plugins.serving.torchserve.build import SHIM_NAME

if TYPE_CHECKING:
    from fides_plugins.serving.torchserve.judge import InferenceJudge
    from fides_plugins.serving.torchserve.original import Found

_MARK = "fides-probe:"
_TIMEOUT_S = 120.0


def probe_archive(archive: ModelArchive, python: str | None = None) -> tuple[str, tuple[str, ...]]:
    """Unpack a protected archive and try both handlers in a new process; what the original one is, and notes on it.

    Raises
    ------
    InputError
        If the handler, its settings or its bundle cannot be used, with the reason that a worker would log; or if the
        bundle is for a model with other classes.
    """
    with tempfile.TemporaryDirectory(prefix="fides-probe-") as folder:
        root = Path(folder) / "model"
        write_folder(root, archive)
        # A program text instead of `-m`: the vendored package may be the only one the interpreter has.
        program = f"import sys; sys.path.insert(0, {str(root)!r}); import {SHIM_NAME[:-3]}; " + (
            "from fides_plugins.serving.torchserve import probe; probe.run()"
        )
        env = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
        try:
            done = subprocess.run(
                [python or sys.executable, "-c", program],
                cwd=root,
                env=env,
                capture_output=True,
                text=True,
                timeout=_TIMEOUT_S,
                check=False,
            )
            written, errors = done.stdout, done.stderr
        except subprocess.TimeoutExpired as slow:
            so_far: str | bytes = slow.stdout or b""
            written = so_far if isinstance(so_far, str) else so_far.decode("utf-8", "replace")
            errors = ""
            if _MARK not in written:
                raise InputError(f"Importing the handler took more than {_TIMEOUT_S:.0f} s.") from None
        except OSError as error:
            raise InputError(f"The interpreter {python} cannot be run: {error.strerror}.") from None
    lines = [json.loads(x[len(_MARK) :]) for x in written.splitlines() if x.startswith(_MARK)]
    if not lines:
        last = (errors.strip().splitlines() or ["no message"])[-1]
        raise InputError(
            f"The handler cannot be imported: {last}", "Fix it, or name the server's Python with --python."
        )
    told = {"note": "The handler could not be tried on a row: loading its model did not end."}
    for line in lines:
        told = {**told, **line}
    if "error" in told:
        raise InputError(told["error"])
    return told["description"], (told["note"],) if told["note"] else ()


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
