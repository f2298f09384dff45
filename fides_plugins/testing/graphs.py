"""Small ONNX graphs with which a fake bundle is a real one. Needs the package `onnx` (extra `testing`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: Name of the input tensor of fake queries and of the fake verification model.
INPUT_NAME = "pixels"
#: Opset of every graph made here; old enough for any supported onnxruntime.
OPSET = 17


def linear_onnx(weight: NDArray[np.float32], input_name: str = INPUT_NAME, output_name: str = "logits") -> bytes:
    """An ONNX graph x (N, D) -> x @ weight (N, K)."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    d, k = weight.shape
    graph = helper.make_graph(
        [helper.make_node("MatMul", [input_name, "weight"], [output_name])],
        "linear",
        [helper.make_tensor_value_info(input_name, TensorProto.FLOAT, ["N", d])],
        [helper.make_tensor_value_info(output_name, TensorProto.FLOAT, ["N", k])],
        [numpy_helper.from_array(np.asarray(weight, np.float32), "weight")],
    )
    return _model(onnx, graph)


def _pair_onnx(nodes: list[Any], output: str, output_shape: list[Any], constants: Sequence[Any] = ()) -> bytes:
    import onnx
    from onnx import TensorProto, helper

    inputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", "K"]) for n in ("service", "verification")]
    outputs = [helper.make_tensor_value_info(output, TensorProto.FLOAT, output_shape)]
    return _model(onnx, helper.make_graph(nodes, output, inputs, outputs, list(constants)))


def _model(onnx: Any, graph: Any) -> bytes:
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", OPSET)], ir_version=8)
    return bytes(model.SerializeToString())


def total_variation_detector_onnx() -> bytes:
    """A detector graph whose score is the total variation between both distributions."""
    from onnx import helper, numpy_helper

    nodes = [
        helper.make_node("Sub", ["service", "verification"], ["difference"]),
        helper.make_node("Abs", ["difference"], ["absolute"]),
        helper.make_node("ReduceSum", ["absolute", "axes"], ["total"], keepdims=0),
        helper.make_node("Mul", ["total", "half"], ["raw"]),
        helper.make_node("Clip", ["raw", "zero", "one"], ["score"]),
    ]
    constants = [
        numpy_helper.from_array(np.array([1], np.int64), "axes"),
        *(numpy_helper.from_array(np.array(v, np.float32), n) for n, v in (("half", 0.5), ("zero", 0.0), ("one", 1.0))),
    ]
    return _pair_onnx(nodes, "score", ["N"], constants)


def reference_reclassifier_onnx() -> bytes:
    """A re-classifier graph that answers with the reference."""
    from onnx import helper

    return _pair_onnx([helper.make_node("Identity", ["verification"], ["probabilities"])], "probabilities", ["N", "K"])
