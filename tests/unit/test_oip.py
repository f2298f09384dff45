"""The codec of the Open Inference Protocol: tensors survive it in both forms, and what does not fit is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fides_plugins import oip
from fides_plugins.errors import InputError, ServerError

TEXTS = np.array([b"", b"abc", "d\u00e9".encode()], dtype=np.object_)
TENSORS = {
    "numbers": np.arange(6, dtype=np.float32).reshape(2, 3) / 7,
    "big endian": np.arange(3, dtype=">i8"),
    "flags": np.array([[True], [False]]),
    "texts": TEXTS,
    "none": np.zeros((0, 4), np.uint8),
}


def test_types_have_names_both_ways() -> None:
    for name in oip.OIP_TYPES:
        assert oip.oip_type(oip.numpy_dtype(name)) == name
    assert oip.numpy_dtype("BYTES") == np.object_
    with pytest.raises(InputError, match="BF16"):
        oip.numpy_dtype("BF16")
    with pytest.raises(InputError, match="object"):
        oip.oip_type(np.dtype(object))


@pytest.mark.parametrize("binary", [True, False])
def test_an_answer_survives(binary: bool) -> None:
    body, headers = oip.answer_body("m", TENSORS, "7", TENSORS if binary else ())
    assert (oip.JSON_LENGTH in headers) == binary
    found = oip.read_answer(body, headers.get(oip.JSON_LENGTH))
    assert list(found) == list(TENSORS)
    for name, array in TENSORS.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == array.dtype.newbyteorder("<")
    only = oip.read_answer(body, headers.get(oip.JSON_LENGTH), ("flags", "texts"))
    assert list(only) == ["flags", "texts"]
    assert oip.first_text({"a": TEXTS[1:]}, "a") == "abc"
    assert oip.first_text(found, "numbers") is oip.first_text(found, "none") is oip.first_text(found, "other") is None


@pytest.mark.parametrize("binary", [True, False])
def test_a_request_survives(binary: bool) -> None:
    body, headers = oip.request_body(TENSORS, parameters={"a": "b"}, outputs=("y",), binary=binary)
    text, tail = oip.split_body(body, oip.read_length(headers.get(oip.JSON_LENGTH)))
    document = oip.read_json(text, "inputs")
    assert document["parameters"] == {"a": "b", **({"binary_data_output": True} if binary else {})}
    assert document["outputs"] == [{"name": "y", **({"parameters": {"binary_data": True}} if binary else {})}]
    found = oip.read_tensors(document, "inputs", tail, texts=True)
    assert {n: a.tolist() for n, a in found.items()} == {n: a.tolist() for n, a in TENSORS.items()}
    # Where nobody asked for text it is refused: it takes many times its bytes.
    with pytest.raises(InputError, match="BYTES"):
        oip.read_tensors(document, "inputs", tail)


def test_what_json_cannot_hold_is_not_sent() -> None:
    with pytest.raises(InputError, match="not finite"):
        oip.request_body({"x": np.array([np.nan], np.float32)}, binary=False)
    with pytest.raises(InputError, match="no text"):
        oip.request_body({"x": np.array([b"\xff"], dtype=object)}, binary=False)


def test_tensors_of_fixed_width_survive_and_bad_ones_do_not() -> None:
    array = np.arange(6, dtype=np.int64).reshape(2, 3)
    back = oip.tensor_from_bytes(oip.tensor_bytes(array), "INT64", (2, 3))
    np.testing.assert_array_equal(back, array)
    for data, dtype, shape in ((b"", "FP32", (1,)), (b"1234", "FP32", (-1, -1)), (b"1", "BYTES", (1,))):
        with pytest.raises(InputError):
            oip.tensor_from_bytes(data, dtype, shape)


@pytest.mark.parametrize(
    "change",
    [
        {"datatype": "BF16"}, {"shape": [2]}, {"shape": [-1]}, {"shape": 1}, {"name": 7}, {"data": ["1"]},
        {"data": None}, {"datatype": "UINT8", "data": [256]}, {"datatype": "BYTES", "data": [1]},
        {"datatype": "BYTES", "data": [["a"], "b"]}, {"datatype": "BYTES", "data": ["\ud83d"]},
        {"parameters": {"binary_data_size": 9}},
        {"parameters": {"binary_data_size": -1}}, {"parameters": {"binary_data_size": "4"}},
    ],
)  # fmt: skip
def test_answers_that_do_not_fit_together_are_server_errors(change: dict[str, Any]) -> None:
    entry = {"name": "y", "datatype": "FP32", "shape": [1], "data": [1.0]}
    assert oip.read_answer(json.dumps({"outputs": [entry]}).encode())["y"].tolist() == [1.0]
    with pytest.raises(ServerError, match="not of the Open Inference Protocol"):
        oip.read_answer(json.dumps({"outputs": [{**entry, **change}]}).encode())


@pytest.mark.parametrize("data", [b"\x01", b"\x05\x00\x00\x00abc", b"\xff\xff\xff\xff"])
def test_bytes_that_end_within_an_element_are_refused(data: bytes) -> None:
    assert oip.decode_bytes(oip.encode_bytes(TEXTS)).tolist() == TEXTS.tolist()
    with pytest.raises(InputError, match="within an element"):
        oip.decode_bytes(data)


@given(st.binary(max_size=300), st.none() | st.text(max_size=3) | st.integers(0, 300).map(str))
@settings(max_examples=300, deadline=None)
def test_arbitrary_answers_never_crash(body: bytes, header: str | None) -> None:
    assert isinstance(oip.read_error(body), str)
    try:
        assert isinstance(oip.read_answer(body, header), dict)
    except ServerError:
        return


def test_the_servers_words_are_found() -> None:
    assert oip.read_error(b'{"error": "no such model"}') == "no such model"
    assert oip.read_error(b'{"error": 3}') == oip.read_error(b"[1]") == oip.read_error(b"[" * 100_000) == ""


def test_the_codec_imports_numpy_and_nothing_else() -> None:
    program = (
        "import sys; import fides_plugins.oip;"
        "print([m for m in ('pydantic', 'onnxruntime', 'httpx', 'tritonclient', 'torch') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
