"""What is read out of an ONNX file before anything runs it, against the package that writes them."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, parser

from fides_plugins.bundle import Bundle, GraphSpec
from fides_plugins.errors import BundleError
from fides_plugins.onnx_graph import (
    CONTROL_FLOW,
    DATA_LOCATION,
    DOMAIN,
    EXTERNAL_DATA,
    MESSAGES,
    OP_TYPE,
    read_contents,
)
from fides_plugins.onnx_model import OnnxModel
from fides_plugins.testing import linear_onnx

#: One row in, one score out; the loop runs as often as the largest number says.
ENDLESS = """<ir_version: 8, opset_import: ["": 17]>
endless (float[n,k] service, float[n,k] verification) => (float[n] score) {
  times = Constant <value = int64 {9223372036854775807}> ()
  go = Constant <value = bool {1}> ()
  start = ReduceSum <keepdims = 0> (service, axes)
  score = Loop (times, go, start) <body = again (int64 i, bool c, float[n] x) => (bool d, float[n] y) {
    d = Identity (c)
    y = Abs (x)
  }>
}"""


def endless() -> bytes:
    model = parser.parse_model(ENDLESS.replace(", axes", ""))
    return bytes(model.SerializeToString())


def external(raw: bool) -> bytes:
    """A linear graph whose weights lie beside it."""
    model = onnx.load_from_string(linear_onnx(np.eye(3, dtype=np.float32)))
    tensor = model.graph.initializer[0]
    tensor.data_location = TensorProto.EXTERNAL
    tensor.ClearField("raw_data" if raw else "float_data")
    for key, value in (("location", "weights.bin"), ("offset", "0"), ("length", "36")):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
    return bytes(model.SerializeToString())


def test_the_fields_that_are_walked_are_all_that_can_hold_a_node_or_a_tensor():
    for name, fields in MESSAGES.items():
        known = {f.number: f.message_type.name for f in getattr(onnx, name).DESCRIPTOR.fields if f.message_type}
        holding = {number: inner for number, inner in known.items() if inner in MESSAGES}
        assert fields == holding, name
    node, tensor = onnx.NodeProto.DESCRIPTOR.fields_by_name, TensorProto.DESCRIPTOR.fields_by_name
    assert (node["op_type"].number, node["domain"].number) == (OP_TYPE, DOMAIN)
    assert (tensor["external_data"].number, tensor["data_location"].number) == (EXTERNAL_DATA, DATA_LOCATION)


def test_operators_of_every_depth_are_found():
    assert read_contents(endless(), "x").operators >= {"Loop", "Identity", "Abs"}
    inner = helper.make_node("Tanh", ["a"], ["b"])
    function = helper.make_function("own", "F", ["a"], ["b"], [inner], [helper.make_opsetid("", 17)])
    graph = parser.parse_graph("g (float[n] a) => (float[n] b) { b = Abs (a) }")
    graph.node[0].op_type, graph.node[0].domain = "F", "own"
    model = helper.make_model(graph, functions=[function])
    assert read_contents(model.SerializeToString(), "x").operators == {"own:F", "Tanh"}


@pytest.mark.parametrize("raw", [True, False])
def test_weights_outside_of_the_digest_are_never_loaded(raw: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # Before, onnxruntime took them from the working directory: the same digest, other weights.
    (tmp_path / "weights.bin").write_bytes(np.eye(3, dtype=np.float32).tobytes())
    monkeypatch.chdir(tmp_path)
    assert read_contents(external(raw), "x").external
    with pytest.raises(BundleError, match=r"keeps weights in another file, which no digest covers.*one file"):
        OnnxModel(external(raw), name="verification.onnx")


def test_weights_outside_are_found_in_attributes_and_functions_too():
    model = onnx.load_from_string(external(raw=True))
    tensor = model.graph.initializer[0]
    constant = helper.make_node("Constant", [], ["w"], value=tensor)
    for place in ("node", "function", "branch"):
        outer = onnx.load_from_string(linear_onnx(np.eye(3, dtype=np.float32)))
        if place == "node":
            outer.graph.node.append(constant)
        elif place == "function":
            made = helper.make_function("own", "F", [], ["w"], [constant], [helper.make_opsetid("", 17)])
            outer.functions.append(made)
        else:
            branch = helper.make_graph([constant], "b", [], [helper.make_tensor_value_info("w", 1, [3, 3])])
            outer.graph.node.append(helper.make_node("If", ["c"], ["w"], then_branch=branch, else_branch=branch))
        assert read_contents(outer.SerializeToString(), "x").external, place


def test_a_bundle_whose_detector_would_run_for_ever_is_refused_before_anything_runs(bundle_folder: Path):
    bundle = Bundle.load(bundle_folder)
    files = {name: bundle.file(name) for name in bundle.file_names}
    with pytest.raises(BundleError, match=r"detector.onnx has operators that are not allowed in it: Loop.*plug-in"):
        Bundle.in_memory(bundle.manifest, {**files, "detector.onnx": endless()})
    spec = bundle.manifest.verification
    assert spec is not None
    with pytest.raises(BundleError, match=r"verification.onnx has operators .*: Loop"):
        Bundle.in_memory(bundle.manifest, {**files, "verification.onnx": endless()})


def test_what_training_exports_has_allowed_operators_only(bundle_folder: Path):
    bundle = Bundle.load(bundle_folder)
    for name in ("detector.onnx", "reclassifier.onnx"):
        bundle.model(GraphSpec(file=name))
    assert not CONTROL_FLOW & read_contents(bundle.file("verification.onnx"), "x").operators


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_damaged_bytes_are_an_error_or_a_model_and_nothing_else(data: st.DataObject):
    good = linear_onnx(np.eye(3, dtype=np.float32))
    changed = bytearray(good[: data.draw(st.integers(0, len(good)))])
    for _ in range(data.draw(st.integers(0, 4)) if changed else 0):
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(BundleError):
        read_contents(bytes(changed), "x")


def test_graphs_within_graphs_without_end_are_refused():
    data = b""
    for _ in range(200):
        data = b"\x32" + _length(data) + data  # AttributeProto.g
        data = b"\x2a" + _length(data) + data  # NodeProto.attribute
        data = b"\x0a" + _length(data) + data  # GraphProto.node
    with pytest.raises(BundleError, match="no ONNX model"):
        read_contents(b"\x3a" + _length(data) + data, "x")


def _length(data: bytes) -> bytes:
    size, out = len(data), bytearray()
    while size > 0x7F:
        out.append(size & 0x7F | 0x80)
        size >>= 7
    return bytes([*out, size])
