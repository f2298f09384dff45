"""Tensors as bytes, and the digests by which receipts name them."""

from __future__ import annotations

import numpy as np
import pytest

from fides_plugins.attestation.tensors import tensor_digest
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


def test_objects_have_no_digest() -> None:
    with pytest.raises(InputError, match="not supported"):
        tensor_digest(np.array(["text"], dtype=object))
