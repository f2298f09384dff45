"""Tensors as bytes: the digests that client, host and enclave compute independently.

A digest covers data type and shape as well as the bytes, so that the same bytes cannot be presented as
another tensor. Data types carry their names of the Open Inference Protocol.
"""

from __future__ import annotations

import hashlib
import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fides_plugins.errors import InputError

_DOMAIN = b"fides-tensor/1"

#: Names of the Open Inference Protocol (KServe v2) for the types that have a fixed width.
OIP_TYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype("u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype("i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
}
_NAMES = {dtype: name for name, dtype in OIP_TYPES.items()}


def oip_type(dtype: np.dtype[Any]) -> str:
    """Name of a numpy data type in the Open Inference Protocol.

    Raises
    ------
    InputError
        For types of variable width, which have no bytes to hash.
    """
    name = _NAMES.get(np.dtype(dtype).newbyteorder("<"))
    if name is None:
        raise InputError(f"Tensors of type {dtype} cannot be hashed.", f"Use one of {', '.join(OIP_TYPES)}.")
    return name


def tensor_bytes(array: NDArray[Any]) -> bytes:
    """The tensor's bytes: little-endian, row-major."""
    return np.ascontiguousarray(array, dtype=OIP_TYPES[oip_type(array.dtype)]).tobytes()


def bytes_digest(data: bytes, dtype: str, shape: tuple[int, ...]) -> bytes:
    """SHA-256 over domain tag, type, shape and bytes of a tensor; 32 bytes."""
    digest = hashlib.sha256(_DOMAIN)
    name = dtype.encode("ascii")
    digest.update(struct.pack(f"<B{len(name)}sB{len(shape)}Q", len(name), name, len(shape), *shape))
    digest.update(data)
    return digest.digest()


def tensor_digest(array: NDArray[Any]) -> bytes:
    """`bytes_digest` of an array: what a client computes over its own input; 32 bytes."""
    return bytes_digest(tensor_bytes(array), oip_type(array.dtype), array.shape)


def tensor_from_bytes(data: bytes, dtype: str, shape: tuple[int, ...]) -> NDArray[Any]:
    """The read-only array that `tensor_bytes` came from.

    Raises
    ------
    InputError
        If the type is unknown, a dimension is negative, the length does not fit, or no array can have the shape.
    """
    if dtype not in OIP_TYPES:
        raise InputError(f"Tensors of type {dtype!r} are not supported.", f"Use one of {', '.join(OIP_TYPES)}.")
    count = 1
    for dimension in shape:
        if dimension < 0:
            raise InputError(f"The shape {list(shape)} has a negative dimension.")
        count *= dimension
    expected = count * OIP_TYPES[dtype].itemsize
    if len(data) != expected:
        raise InputError(f"A tensor of type {dtype} and shape {list(shape)} has {expected} bytes, not {len(data)}.")
    try:
        return np.frombuffer(data, dtype=OIP_TYPES[dtype]).reshape(shape)
    except ValueError:
        # Without a row every length fits, but numpy multiplies the other dimensions all the same.
        raise InputError(f"No tensor of type {dtype} can have the shape {list(shape)}.") from None
