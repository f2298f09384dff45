from __future__ import annotations

import numpy as np
import pytest

from fides_plugins.errors import BundleError
from fides_plugins.onnx_model import OnnxModel
from fides_plugins.testing import linear_onnx


def test_bytes_that_are_no_graph_are_refused():
    with pytest.raises(BundleError, match="cannot be loaded by onnxruntime"):
        OnnxModel(b"not a graph", name="x.onnx")


def test_a_free_axis_is_told():
    assert OnnxModel(linear_onnx(np.eye(3, dtype=np.float32))).inputs[0].shape == (None, 3)
