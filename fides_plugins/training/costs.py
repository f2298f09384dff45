"""What a model costs: parameters and multiply-adds for one row.

Multiply-adds (MACs) of convolutions and matrix products are counted; element-wise work and biases are not,
as is usual when networks are compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fides_plugins.errors import TrainingError

if TYPE_CHECKING:
    import onnx
    import torch


@dataclass(frozen=True)
class Cost:
    """Parameters (numbers stored) and multiply-adds for one row."""

    parameters: int
    macs: int

    def within(self, max_parameters: int | None, max_macs: int | None) -> bool:
        """Whether both limits hold; None is no limit."""
        return (max_parameters is None or self.parameters <= max_parameters) and (
            max_macs is None or self.macs <= max_macs
        )


def torch_cost(module: torch.nn.Module, images: NDArray[Any]) -> Cost:
    """Cost of a torch or TorchScript module for the first of these rows (N, ...)."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    training = module.training
    module.eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(torch.from_numpy(np.ascontiguousarray(images[:1])))
    module.train(training)
    parameters = sum(p.numel() for p in module.parameters())
    return Cost(parameters, counter.get_total_flops() // 2)


def onnx_cost(data: bytes, row_shape: tuple[int, ...]) -> Cost:
    """Cost of an ONNX model with one image input of shape (1, *row_shape).

    Raises
    ------
    TrainingError
        If the bytes are no ONNX model or its shapes cannot be inferred.
    """
    import onnx
    from google.protobuf.message import DecodeError
    from onnx import shape_inference

    try:
        model = onnx.load_model_from_string(data)
        weights = {t.name for t in model.graph.initializer}
        source = next(i for i in model.graph.input if i.name not in weights)
        dims = source.type.tensor_type.shape.dim
        if len(dims) == len(row_shape) + 1:
            for dim, size in zip(dims, (1, *row_shape), strict=True):
                dim.Clear()
                dim.dim_value = size
        # Sizes noted for a free batch would contradict the batch of one set above.
        del model.graph.value_info[:]
        for out in model.graph.output:
            out.type.tensor_type.shape.Clear()
            out.type.tensor_type.ClearField("shape")
        graph = shape_inference.infer_shapes(model, data_prop=True).graph
    except (DecodeError, StopIteration, shape_inference.InferenceError) as error:
        raise TrainingError(f"The cost of the ONNX model cannot be counted: {error}.") from error
    shapes = {t.name: tuple(t.dims) for t in graph.initializer}
    parameters = sum(int(np.prod(dims)) for dims in shapes.values())
    for value in [*graph.input, *graph.value_info, *graph.output]:
        if value.type.tensor_type.HasField("shape"):
            # A free axis left over counts as one: it is the batch.
            shapes[value.name] = tuple(d.dim_value or 1 for d in value.type.tensor_type.shape.dim)
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "Constant" and attribute.name == "value":
                shapes[node.output[0]] = tuple(attribute.t.dims)
                parameters += _size(attribute.t.dims)
    return Cost(parameters, sum(_node_macs(node, shapes) for node in graph.node))


def _node_macs(node: onnx.NodeProto, shapes: dict[str, tuple[int, ...]]) -> int:
    """Multiply-adds of one node; nodes that are neither a convolution nor a product cost nothing here."""
    kind = node.op_type
    if kind in ("Conv", "ConvInteger", "QLinearConv", "ConvTranspose"):
        weight = shapes.get(node.input[3 if kind == "QLinearConv" else 1], ())
        # Weight (out, in / groups, *kernel): each output element sums over everything but `out`. Transposed, it is
        # (in, out / groups, *kernel), and each input element adds to everything but `in`.
        moved = node.input[0] if kind == "ConvTranspose" else node.output[0]
        return _size(shapes.get(moved, ())) * _size(weight[1:])
    if kind in ("MatMul", "MatMulInteger", "Gemm", "QLinearMatMul"):
        left = shapes.get(node.input[0], ())
        transposed = any(a.name == "transA" and a.i for a in node.attribute)
        inner = left[0 if transposed else -1] if left else 0
        return _size(shapes.get(node.output[0], ())) * inner
    return 0


def _size(shape: Sequence[int]) -> int:
    """Number of elements; 0 for a scalar and for a shape that is not known."""
    return int(np.prod(shape)) if shape else 0
