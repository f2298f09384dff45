"""Fakes of queries, predictions and bundles.

The fake bundle is real: its graphs run in onnxruntime. Its verification model reads the input itself as
logits, so a test decides what the reference says by what it puts into the query. Making one needs the
package `onnx` (extra `testing`).
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
from fides_plugins.statistics.divergences import DIVERGENCES, score
from fides_plugins.types import OutputKind, Prediction, Query, softmax

#: Name of the input tensor of fake queries and of the fake verification model.
INPUT_NAME = "pixels"
#: Opset of every graph made here; old enough for any supported onnxruntime.
OPSET = 17
#: A detector graph whose score is the total variation between both distributions.
_TOTAL_VARIATION = """
detector (float[N,K] service, float[N,K] verification) => (float[N] score)
<int64[1] axes = {1}, float half = {0.5}, float zero = {0.0}, float one = {1.0}> {
    difference = Sub(service, verification)
    absolute = Abs(difference)
    total = ReduceSum<keepdims = 0>(absolute, axes)
    raw = Mul(total, half)
    score = Clip(raw, zero, one)
}
"""
#: A re-classifier graph that answers with the reference.
_REFERENCE = """
reclassifier (float[N,K] service, float[N,K] verification) => (float[N,K] probabilities)
{ probabilities = Identity(verification) }
"""


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
    n_classes:
        K.
    output_kind:
        What the service's class output is declared to hold.
    n_calibration:
        Benign rows behind the thresholds; a false-alarm rate a needs at least 1/a - 1.
    manifest:
        Fields of the manifest to set otherwise.
    """
    made = memory_bundle(n_classes, output_kind, n_calibration, **manifest)
    return write_bundle(folder, made.manifest, {name: made.file(name) for name in made.file_names})


def memory_bundle(
    n_classes: int = 10, output_kind: OutputKind = "logits", n_calibration: int = 999, **manifest: Any
) -> Bundle:
    """The bundle of `make_bundle`, in memory: a few kilobytes for ten classes, and nothing on disk."""
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
        "detector.onnx": _graph(_TOTAL_VARIATION),
        "reclassifier.onnx": _graph(_REFERENCE),
        "calibration.json": calibration_file(scores),
    }
    return Bundle.in_memory(Manifest(**fields), files)


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


def _graph(text: str) -> bytes:
    """A model from a graph in ONNX's own notation."""
    import onnx

    return bytes(onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": {OPSET}]> {text}').SerializeToString())
