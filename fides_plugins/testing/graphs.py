"""Small ONNX graphs with which a fake bundle is a real one. Needs the package `onnx` (extra `testing`)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

#: Name of the input tensor of fake queries and of the fake verification model.
INPUT_NAME = "pixels"
#: Opset of every graph made here; old enough for any supported onnxruntime.
OPSET = 17


def linear_onnx(weight: NDArray[np.float32], input_name: str = INPUT_NAME, output_name: str = "logits") -> bytes:
    """An ONNX graph x (N, D) -> x @ weight (N, K)."""
    from onnx import TensorProto, helper, numpy_helper

    d, k = weight.shape
    graph = helper.make_graph(
        [helper.make_node("MatMul", [input_name, "weight"], [output_name])],
        "linear",
        [helper.make_tensor_value_info(input_name, TensorProto.FLOAT, ["N", d])],
        [helper.make_tensor_value_info(output_name, TensorProto.FLOAT, ["N", k])],
        [numpy_helper.from_array(np.asarray(weight, np.float32), "weight")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8)
    return bytes(model.SerializeToString())


def total_variation_detector_onnx() -> bytes:
    """A detector graph whose score is the total variation between both distributions."""
    return _graph(
        """
        detector (float[N,K] service, float[N,K] verification) => (float[N] score)
        <int64[1] axes = {1}, float half = {0.5}, float zero = {0.0}, float one = {1.0}> {
            difference = Sub(service, verification)
            absolute = Abs(difference)
            total = ReduceSum<keepdims = 0>(absolute, axes)
            raw = Mul(total, half)
            score = Clip(raw, zero, one)
        }
        """
    )


def reference_reclassifier_onnx() -> bytes:
    """A re-classifier graph that answers with the reference."""
    return _graph(
        """
        reclassifier (float[N,K] service, float[N,K] verification) => (float[N,K] probabilities)
        { probabilities = Identity(verification) }
        """
    )


def _graph(text: str) -> bytes:
    """A model from a graph in ONNX's own notation."""
    import onnx

    return bytes(onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": {OPSET}]> {text}').SerializeToString())
