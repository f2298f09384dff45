"""Teachers: the service models whose answers a verification model learns.

A teacher is an ONNX file, a TorchScript file, a torch module (`package.module:factory`), or a live endpoint
(`grpc://host:port/model` of Triton, `http://host:port/predictions/model` of TorchServe), so that a
deployment can be protected without its weights. Answers are cached on disk piece by piece: an interrupted
run asks only for what it does not have yet.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from fides_plugins.array_files import read_npy
from fides_plugins.bundle import InputSpec
from fides_plugins.codec import OutputCodec
from fides_plugins.errors import BundleError, InputError, TrainingError
from fides_plugins.onnx_model import OnnxModel
from fides_plugins.training.costs import Cost, onnx_cost, torch_cost
from fides_plugins.training.data import array_digest
from fides_plugins.training.service.endpoints import TorchServeTeacher, TritonTeacher
from fides_plugins.training.service.teacher import CHUNK_ROWS, Teacher, pick_tensor
from fides_plugins.types import Float32Array, OutputKind


class OnnxTeacher(Teacher):
    """An ONNX model run by onnxruntime.

    Parameters
    ----------
    data:
        The file's bytes.
    input_name, output_name:
        Needed only where there are several.
    """

    def __init__(self, data: bytes, name: str = "ONNX model", input_name: str = "", output_name: str = "") -> None:
        try:
            self._model = OnnxModel(data, threads=max(1, (os.cpu_count() or 2) // 2), name=name)
        except BundleError as error:
            raise TrainingError(error.cause_text, "Give an ONNX file that onnxruntime can load.") from error
        self.data = data
        self.name = name
        self.digest = hashlib.sha256(data).hexdigest()
        self._input = pick_tensor(self._model.inputs, input_name, "input", name)
        self._output = pick_tensor(self._model.outputs, output_name, "output", name, prefer_rank=2)
        self.input = InputSpec(
            name=self._input.name, dtype=self._input.dtype.name, shape=(None, *self._input.shape[1:])
        )
        self._fixed = (self._input.shape[0] if self._input.shape else None) or 0
        self.batch = self._fixed or CHUNK_ROWS

    def answer(self, rows: NDArray[Any]) -> NDArray[Any]:
        # A graph with a fixed batch gets its last rows repeated, and the answers to these dropped.
        fed = np.concatenate([rows, np.repeat(rows[-1:], max(0, self._fixed - len(rows)), axis=0)])
        try:
            return self._model.run({self._input.name: fed})[self._output.name][: len(rows)]
        except InputError as error:
            raise TrainingError(f"{self.name}: {error}", "Save the images as the service takes them.") from error

    def cost(self, images: NDArray[Any]) -> Cost | None:
        return onnx_cost(self.data, images.shape[1:])

    def like(self, data: bytes) -> OnnxTeacher:
        """Another model with the same tensors."""
        return OnnxTeacher(data, self.name, self._input.name, self._output.name)


class TorchTeacher(Teacher):
    """A torch or TorchScript module in this process."""

    def __init__(self, module: Any, name: str, input_name: str = "input") -> None:
        self.module = module.eval()
        self.name = name
        self.input_name = input_name
        state = sorted(module.state_dict().items())
        values = array_digest(*(value.detach().cpu().numpy() for _, value in state))
        self.digest = hashlib.sha256(f"{name} {[key for key, _ in state]} {values}".encode()).hexdigest()

    def answer(self, rows: NDArray[Any]) -> NDArray[Any]:
        import torch

        try:
            with torch.no_grad():
                output = self.module(torch.from_numpy(rows))
        except (RuntimeError, ValueError, TypeError) as error:
            raise TrainingError(
                f"{self.name} does not run on images of shape {rows.shape[1:]} and dtype {rows.dtype}: "
                f"{str(error).splitlines()[0]}",
                "Save the images as the service takes them.",
            ) from error
        if not isinstance(output, torch.Tensor):
            raise TrainingError(f"{self.name} gives a {type(output).__name__}, not one tensor of class outputs.")
        return np.asarray(output.detach().numpy())

    def cost(self, images: NDArray[Any]) -> Cost | None:
        return torch_cost(self.module, images)


def load_teacher(
    service: str,
    *,
    input_name: str = "",
    output_name: str = "",
    encoding: str = "json",
    request_key: str = "",
    response_key: str = "",
) -> Teacher:
    """The teacher that a command-line argument means; see the module's text for the forms.

    Raises
    ------
    TrainingError
        If the form is unknown, the file is missing or the endpoint does not answer.
    """
    parts = urlsplit(service)
    if parts.scheme == "grpc":
        model, _, version = parts.path.strip("/").partition("/")
        if not parts.netloc or not model:
            raise TrainingError(f"{service!r} is not of the form grpc://host:port/model.")
        return TritonTeacher(parts.netloc, model, version, input_name, output_name)
    if parts.scheme in ("http", "https"):
        return TorchServeTeacher(service, encoding, request_key, response_key)
    path = Path(service)
    if path.suffix == ".onnx":
        try:
            data = path.read_bytes()
        except OSError as error:
            raise TrainingError(f"{path.name} cannot be read: {error.strerror}.", "Check the path.") from error
        return OnnxTeacher(data, path.name, input_name, output_name)
    from fides_plugins.training.service.torch_modules import load_factory, load_torchscript

    if path.suffix in (".pt", ".pth", ".ts", ".torchscript"):
        return TorchTeacher(load_torchscript(path), path.name, input_name or "input")
    if ":" in service:
        return TorchTeacher(load_factory(service), service, input_name or "input")
    raise TrainingError(
        f"{service!r} is no service model.",
        "Give an .onnx file, a TorchScript file, package.module:factory, grpc://host:port/model "
        "or http://host:port/predictions/model.",
    )


class AnswerCache(Teacher):
    """A teacher whose answers are kept on disk, one file for each piece of rows; what is there is not asked for again.

    `ask` also raises `TrainingError` where a remembered row is answered differently than before.

    Parameters
    ----------
    teacher:
        Who is asked for what is not there.
    folder:
        Where the files are; made when needed. None: nothing is kept.

    Attributes
    ----------
    asked, remembered:
        Rows that the teacher answered, and rows that were found on disk.
    """

    def __init__(self, teacher: Teacher, folder: str | Path | None = None) -> None:
        self.teacher = teacher
        self.name, self.digest = teacher.name, teacher.digest
        self.input, self.input_name = teacher.input, teacher.input_name
        self.folder = None if folder is None else Path(folder)
        self.asked = 0
        self.remembered = 0
        self._checked = False

    def cost(self, images: NDArray[Any]) -> Cost | None:
        return self.teacher.cost(images)

    def close(self) -> None:
        self.teacher.close()

    def answer(self, rows: NDArray[Any]) -> NDArray[Any]:
        if self.folder is None:
            self.asked += len(rows)
            return self.teacher.ask(rows)
        key = hashlib.sha256(f"{self.digest}{array_digest(rows)}".encode()).hexdigest()
        path = self.folder / f"{key}.npy"
        kept = self._read(path, len(rows))
        if kept is not None:
            self._check(rows, kept)
            self.remembered += len(rows)
            return kept
        answer = self.teacher.ask(rows)
        self.asked += len(rows)
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=self.folder, suffix=".part", delete=False) as staging:
            np.save(staging, answer, allow_pickle=False)
        os.replace(staging.name, path)
        return answer

    @staticmethod
    def _read(path: Path, n: int) -> Float32Array | None:
        try:
            kept = read_npy(path)
        except InputError:
            return None  # missing or damaged: the teacher is asked
        return kept if kept.ndim == 2 and len(kept) == n and kept.dtype == np.float32 else None

    def _check(self, rows: NDArray[Any], kept: Float32Array) -> None:
        """Ask for one remembered row again, once: an endpoint may serve another model by now."""
        if self._checked:
            return
        self._checked = True
        now = self.teacher.ask(rows[:1])
        if now.shape[1] != kept.shape[1] or not np.allclose(now, kept[:1], rtol=1e-2, atol=1e-2):
            raise TrainingError(
                f"{self.name} answers differently than when its answers were cached.",
                "Another model is served now: remove the cache folder and start again.",
            )


def output_kind(outputs: Float32Array) -> OutputKind:
    """What raw outputs (N, K) are: "probabilities" if every row is non-negative and sums to one, else "logits"."""
    distributions = (outputs >= 0).all() and OutputCodec("probabilities").read(outputs).valid.all()
    return "probabilities" if distributions else "logits"
