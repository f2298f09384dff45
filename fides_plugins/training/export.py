"""From a trained torch module to ONNX bytes that hold nothing but the network."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import nn

from fides_plugins.errors import TrainingError
from fides_plugins.onnx_model import OnnxModel

OPSET = 18
#: Outputs of graph and module may differ by this much, relative to their size.
TOLERANCE = 1e-3


def export_onnx(
    module: nn.Module, images: NDArray[Any], input_name: str = "input", output_name: str = "logits"
) -> bytes:
    """Export a module with a free batch axis, and check the graph against it.

    Parameters
    ----------
    module:
        Takes one tensor (N, ...) and gives one (N, K).
    images:
        A few rows (at least 3) of what it takes; they fix every axis but the first and check the result.

    Raises
    ------
    TrainingError
        If the graph and the module disagree, at any batch size that was tried.
    """
    module.eval()
    x = torch.from_numpy(np.ascontiguousarray(images[:3]))
    if any(isinstance(m, torch.jit.ScriptModule) for m in module.modules()):
        model = _export_traced(module, x, input_name, output_name)
    else:
        model = to_onnx(module, (x,), [input_name], [output_name], ({0: torch.export.Dim("batch")},))
    strip(model)
    data: bytes = model.SerializeToString(deterministic=True)
    _check(data, module, x, input_name)
    return data


def to_onnx(
    module: nn.Module,
    example: tuple[torch.Tensor, ...],
    inputs: Sequence[str],
    outputs: Sequence[str],
    dynamic_shapes: Any,
) -> onnx.ModelProto:
    """The graph of a module by torch's exporter, without its warnings about its own internals.

    Parameters
    ----------
    example:
        One tensor per input.
    dynamic_shapes:
        As for `torch.onnx.export`: the free axes of each input.

    Raises
    ------
    TrainingError
        If the exporter gives no graph.
    """
    loggers = [logging.getLogger(n) for n in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                module,
                example,
                dynamo=True,
                verbose=False,
                opset_version=OPSET,
                input_names=list(inputs),
                output_names=list(outputs),
                dynamic_shapes=dynamic_shapes,
            )
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
    if program is None:
        raise TrainingError("torch's exporter gave no graph.", "Install the torch release that this package pins.")
    return program.model_proto


def _export_traced(module: nn.Module, x: torch.Tensor, input_name: str, output_name: str) -> onnx.ModelProto:
    """TorchScript modules cannot pass through torch.export; the older exporter still takes them."""
    buffer: Any = io.BytesIO()  # taken by the exporter, though its signature says a path
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Traced as a whole first: the exporter's own trace does not find a scripted part inside a module.
        traced: Any = torch.jit.trace(module, (x,))  # type: ignore[no-untyped-call]
        torch.onnx.export(
            traced,
            (x,),
            buffer,
            dynamo=False,
            opset_version=OPSET,
            input_names=[input_name],
            output_names=[output_name],
            dynamic_axes={input_name: {0: "batch"}, output_name: {0: "batch"}},
        )
    return onnx.load_model_from_string(buffer.getvalue())


def strip(model: onnx.ModelProto) -> None:
    """Remove what exporters add besides the network (stack traces hold paths of the machine), in place."""
    model.doc_string = ""
    del model.metadata_props[:]
    graph = model.graph
    graph.doc_string = ""
    graph.name = "fides"
    del graph.metadata_props[:]
    for part in (*graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        part.doc_string = ""
        del part.metadata_props[:]


def _check(data: bytes, module: nn.Module, x: torch.Tensor, input_name: str) -> None:
    graph = OnnxModel(data, name="the exported graph")
    for n in (1, len(x)):
        with torch.no_grad():
            wanted = module(x[:n]).numpy()
        (got,) = graph.run({input_name: x[:n].numpy()}).values()
        error = float(np.abs(got - wanted).max())
        if got.shape != wanted.shape or error > TOLERANCE * max(1.0, float(np.abs(wanted).max())):
            raise TrainingError(
                f"The exported graph differs from the torch module by {error:.2g} in a batch of {n}.",
                "Use layers whose meaning does not depend on the batch.",
            )
