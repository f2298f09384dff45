"""Run an ONNX graph from bytes, with onnxruntime, on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from fides_plugins.errors import BundleError, InputError
from fides_plugins.onnx_graph import read_contents

_DTYPES: dict[str, Any] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(uint8)": np.uint8,
    "tensor(int8)": np.int8,
    "tensor(uint16)": np.uint16,
    "tensor(int16)": np.int16,
    "tensor(int32)": np.int32,
    "tensor(int64)": np.int64,
    "tensor(bool)": np.bool_,
}


@dataclass(frozen=True)
class TensorInfo:
    """Name, dtype and shape of one input or output; a free axis is None."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | None, ...]

    @cached_property
    def _sizes(self) -> tuple[tuple[int, int], ...]:
        """The axes that are not free, and their sizes."""
        return tuple((axis, size) for axis, size in enumerate(self.shape) if size is not None)

    def check(self, array: NDArray[Any]) -> None:
        """Compare an array with this description.

        Raises
        ------
        InputError
            Naming the tensor, what it is and what is expected.
        """
        shape = array.shape
        fits = len(shape) == len(self.shape)
        for axis, size in self._sizes if fits else ():
            fits = fits and shape[axis] == size
        if not fits:
            expected = "x".join("N" if s is None else str(s) for s in self.shape)
            have = "x".join(map(str, shape))
            raise InputError(f"Input {self.name!r} has shape {have}; expected {expected}.")
        if array.dtype != self.dtype:
            raise InputError(f"Input {self.name!r} has dtype {array.dtype}; expected {self.dtype}.")


class OnnxModel:
    """One onnxruntime session over a model held in memory.

    Parameters
    ----------
    data:
        The ONNX file's bytes: the very bytes whose digest was checked.
    threads:
        Intra-op threads of the session. Calls from several Python threads are safe.
    name:
        For messages.
    allows:
        Says of an operator whether the graph may have it; asked before anything of the graph runs.

    Raises
    ------
    BundleError
        If onnxruntime cannot load the graph, some of its weights lie outside of `data`, or it has an operator that
        is not allowed.
    """

    def __init__(
        self, data: bytes, threads: int = 1, name: str = "model", allows: Callable[[str], bool] = lambda operator: True
    ) -> None:
        contents = read_contents(data, name)
        refused = sorted(operator for operator in contents.operators if not allows(operator))
        if refused:
            raise BundleError(
                f"{name} has operators that are not allowed in it: {', '.join(refused[:5])}.",
                "Put a graph that needs them into a plug-in, which runs under a deadline.",
            )
        if contents.external:
            raise BundleError(
                f"{name} keeps weights in another file, which no digest covers.",
                "Save it as one file: onnx.save(onnx.load(path), path).",
            )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        # Spinning workers would burn the cores that the service model needs.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.name = name
        try:
            self._session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime raises several unrelated classes; all mean "not a usable graph"
            why = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            raise BundleError(
                f"{name} cannot be loaded by onnxruntime: {why}",
                "Make the bundle again with `fides fit`.",
            ) from None
        self.inputs = tuple(_info(i) for i in self._session.get_inputs())
        self.outputs = tuple(_info(o) for o in self._session.get_outputs())
        self._output_names = [o.name for o in self.outputs]

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Outputs by name for inputs by name.

        Raises
        ------
        InputError
            If an input is missing, or has another shape or dtype than the graph takes.
        """
        arrays = {}
        for info in self.inputs:
            array = feeds.get(info.name)
            if array is None:
                raise InputError(f"{self.name} needs the input {info.name!r}; got {sorted(feeds)}.")
            info.check(array)
            arrays[info.name] = np.ascontiguousarray(array)
        # With the names given, onnxruntime does not look them up on every call.
        outputs = self._session.run(self._output_names, arrays)
        return dict(zip(self._output_names, outputs, strict=True))


def _info(node: Any) -> TensorInfo:
    if node.type not in _DTYPES:
        raise BundleError(f"Tensor {node.name!r} has the type {node.type}, which is not supported.")
    shape = tuple(s if isinstance(s, int) and s >= 0 else None for s in node.shape)
    return TensorInfo(node.name, np.dtype(_DTYPES[node.type]), shape)
