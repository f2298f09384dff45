"""Tensors in what handlers pass around: numpy, torch, lists, tuples, mappings, objects."""

from __future__ import annotations

from collections import namedtuple
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fides_plugins.errors import InputError
from fides_plugins.serving.torchserve.tensors import ClassOutput, query_inputs, to_numpy
from fides_plugins.types import softmax

torch = pytest.importorskip("torch")

LOGITS = np.array([[3.0, 1.0, 0.0], [0.0, 4.0, 1.0], [1.0, 0.0, 5.0]], dtype=np.float32)
FIXED = np.array([[0.1, 0.2, 0.7]], dtype=np.float32)
Pair = namedtuple("Pair", "features logits")


def test_inputs_are_copied() -> None:
    tensor = torch.ones(2, 3)
    inputs = query_inputs(tensor, "x", 2)
    tensor.zero_()
    assert inputs["x"].sum() == 6


@pytest.mark.parametrize(
    ("data", "names"),
    [
        (torch.zeros(2, 3), ["x"]),
        (np.zeros((2, 3)), ["x"]),
        ([[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]], ["x"]),
        ([torch.zeros(3), torch.zeros(3)], ["x"]),
        ((torch.zeros(2, 3), "text"), ["x"]),
        ((torch.zeros(2, 3), torch.zeros(2, 4)), ["0", "1"]),
        ({"ids": torch.zeros(2, 3), "mask": torch.zeros(2, 3), "note": "text"}, ["ids", "mask"]),
    ],
)
def test_inputs_have_one_row_per_request(data: Any, names: list[str]) -> None:
    inputs = query_inputs(data, "x", 2)
    assert list(inputs) == names
    assert {len(a) for a in inputs.values()} == {2}


@pytest.mark.parametrize("data", [None, "text", b"bytes", {}, {"a": "b"}, object(), [["ragged"], [1, 2]]])
def test_no_tensor_is_an_input_error(data: Any) -> None:
    with pytest.raises(InputError):
        query_inputs(data, "x", 2)


def test_bfloat16_is_read() -> None:
    assert to_numpy(torch.ones(2, dtype=torch.bfloat16)).dtype == np.float32


OUTPUTS = {
    "tensor": (torch.tensor(LOGITS), ""),
    "float16 tensor": (torch.tensor(LOGITS, dtype=torch.float16), ""),
    "array": (LOGITS.copy(), ""),
    "lists": (LOGITS.tolist(), ""),
    "rows": ([torch.tensor(r) for r in LOGITS], ""),
    "one matrix": ([LOGITS.copy()], ""),
    "tuple": ((torch.zeros(3, 8), torch.tensor(LOGITS)), "1"),
    "named tuple": (Pair(torch.zeros(3, 8), torch.tensor(LOGITS)), "logits"),
    "mapping": ({"features": torch.zeros(3, 8), "logits": torch.tensor(LOGITS)}, "logits"),
    "single mapping": ({"logits": torch.tensor(LOGITS), "note": "text"}, ""),
    "object": (SimpleNamespace(features=torch.zeros(3, 8), logits=torch.tensor(LOGITS)), "logits"),
}


@pytest.mark.parametrize("what", OUTPUTS)
def test_a_correction_changes_only_its_rows(what: str) -> None:
    output, name = OUTPUTS[what]
    found = ClassOutput.find(output, name)
    np.testing.assert_allclose(found.array, LOGITS)
    changed = ClassOutput.find(found.replaced(np.array([1]), np.log(FIXED)), name)
    np.testing.assert_array_equal(changed.array[[0, 2]], LOGITS[[0, 2]])
    np.testing.assert_allclose(softmax(changed.array[[1]]), FIXED, atol=1e-3)
    assert changed.array.dtype == found.array.dtype
    assert type(changed.whole) is type(output)
    np.testing.assert_allclose(ClassOutput.find(output, name).array, LOGITS)


def test_a_row_is_written_as_it_is() -> None:
    found = ClassOutput.find(torch.tensor(softmax(LOGITS)), "")
    np.testing.assert_allclose(found.replaced(np.array([0]), FIXED)[0], FIXED[0])


def test_a_tensor_made_in_inference_mode_can_be_corrected() -> None:
    with torch.inference_mode():
        output = torch.tensor(LOGITS) + 1
    changed = ClassOutput.find(output, "").replaced(np.array([2]), np.log(FIXED))
    np.testing.assert_allclose(softmax(changed.numpy()[[2]]), FIXED, atol=1e-5)


@pytest.mark.parametrize(
    ("output", "name"),
    [
        ((torch.zeros(3, 8), torch.tensor(LOGITS)), ""),
        ({"a": LOGITS, "b": LOGITS}, ""),
        ({"a": LOGITS}, "b"),
        ("text", ""),
        (None, ""),
    ],
)
def test_an_ambiguous_output_is_never_guessed(output: Any, name: str) -> None:
    with pytest.raises(InputError):
        ClassOutput.find(output, name)
