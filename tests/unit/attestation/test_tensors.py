"""Tensors as bytes, and the digests by which receipts name them."""

from __future__ import annotations

import numpy as np
import pytest

from fides_plugins.attestation.tensors import tensor_bytes, tensor_digest, tensor_from_bytes
from fides_plugins.errors import InputError


def test_digests_cover_type_shape_and_bytes() -> None:
    array = np.arange(6, dtype=np.float32)
    digests = {
        tensor_digest(array),
        tensor_digest(array.reshape(2, 3)),
        tensor_digest(array.view(np.int32)),
        tensor_digest(array + 1),
    }
    assert len(digests) == 4
    column_major = np.asfortranarray(array.reshape(2, 3))
    assert tensor_digest(column_major) == tensor_digest(array.reshape(2, 3))
    assert tensor_digest(array.astype(">f4")) == tensor_digest(array)


def test_tensors_survive_the_round_trip() -> None:
    array = np.arange(6, dtype=np.int64).reshape(2, 3)
    back = tensor_from_bytes(tensor_bytes(array), "INT64", (2, 3))
    np.testing.assert_array_equal(back, array)


@pytest.mark.parametrize(
    ("data", "dtype", "shape"), [(b"", "FP32", (1,)), (b"1234", "FP32", (-1, -1)), (b"1", "BYTES", (1,))]
)
def test_bytes_that_are_no_tensor_are_refused(data: bytes, dtype: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError):
        tensor_from_bytes(data, dtype, shape)


def test_objects_have_no_digest() -> None:
    with pytest.raises(InputError, match="cannot be hashed"):
        tensor_digest(np.array(["text"], dtype=object))
