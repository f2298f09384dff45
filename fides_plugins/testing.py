"""What an author of a plug-in needs to test it: fakes of queries, predictions and bundles.

The fake bundle is real: its graphs run in onnxruntime. Its verification model reads the input itself as
logits, so a test decides what the reference says by what it puts into the query. Making one needs the
package `onnx` (extra `train`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fides_plugins.bundle import (
    Bundle,
    CalibrationSpec,
    GraphSpec,
    InputSpec,
    Manifest,
    ServiceSpec,
    VerificationSpec,
    calibration_file,
    write_bundle,
)
from fides_plugins.divergences import DIVERGENCES, score
from fides_plugins.types import OutputKind, Prediction, Query, softmax

INPUT_NAME = "pixels"
#: Opset of every graph made here; old enough for any supported onnxruntime.
OPSET = 17


def fake_logits(n_rows: int = 8, n_classes: int = 10, seed: int = 0, margin: float = 4.0) -> NDArray[np.float32]:
    """(N, K) float32 logits with a clear winner per row, `margin` above the rest."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 0.5, (n_rows, n_classes))
    logits[np.arange(n_rows), rng.integers(0, n_classes, n_rows)] += margin
    return logits.astype(np.float32)


def fake_query(logits: NDArray[np.float32] | None = None, **kwargs: Any) -> Query:
    """A query for which the fake bundle's reference is softmax(logits)."""
    return Query({INPUT_NAME: fake_logits() if logits is None else logits}, **kwargs)


def fake_service(logits: NDArray[np.float32], seed: int = 1, noise: float = 0.1) -> Prediction:
    """An honest service's answer: the same logits with a little noise."""
    rng = np.random.default_rng(seed)
    return Prediction.from_output(logits + rng.normal(0, noise, logits.shape), "logits")


def switch_top_two(probabilities: NDArray[np.float32], rows: Sequence[int] | None = None) -> NDArray[np.float32]:
    """A lie: exchange the two highest probabilities of the given rows (all by default)."""
    lie = np.array(probabilities, dtype=np.float32)
    index = np.arange(len(lie)) if rows is None else np.asarray(rows, dtype=np.int64)
    top = np.argsort(lie[index], axis=1)[:, -2:]
    lie[index[:, None], top] = lie[index[:, None], top[:, ::-1]]
    return lie


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


def make_bundle(
    folder: str | Path,
    n_classes: int = 10,
    output_kind: OutputKind = "logits",
    n_calibration: int = 999,
    **manifest: Any,
) -> Bundle:
    """Write a small real bundle whose verification model reads its input (N, K) as logits.

    Parameters
    ----------
    folder:
        Where it goes.
    output_kind:
        What the service's class output is declared to hold.
    manifest:
        Fields of the manifest to set otherwise.
    """
    logits = fake_logits(n_calibration, n_classes, seed=7)
    service, reference = fake_service(logits, seed=8).probabilities, softmax(logits)
    tv = np.clip(DIVERGENCES["total_variation"](service, reference), 0, 1)
    scores = {"learned": tv, **{name: score(name, service, reference) for name in DIVERGENCES}}
    fields: dict[str, Any] = {
        "name": "fake",
        "class_names": tuple(f"class {i}" for i in range(n_classes)),
        "input": InputSpec(name=INPUT_NAME, dtype="float32", shape=(None, n_classes)),
        "service": ServiceSpec(output_kind=output_kind),
        "verification": VerificationSpec(input_name=INPUT_NAME),
        "detector": GraphSpec(file="detector.onnx"),
        "reclassifier": GraphSpec(file="reclassifier.onnx"),
        "calibration": CalibrationSpec(n_rows=n_calibration, false_alarm_rate=0.01),
        **manifest,
    }
    files = {
        "verification.onnx": linear_onnx(np.eye(n_classes, dtype=np.float32)),
        "detector.onnx": total_variation_detector_onnx(),
        "reclassifier.onnx": reference_reclassifier_onnx(),
        "calibration.json": calibration_file(scores),
    }
    return write_bundle(folder, Manifest(**fields), files)
