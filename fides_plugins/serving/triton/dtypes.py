"""Triton's data types, numpy's, and the wire format of BYTES tensors."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fides_plugins.errors import InputError

_TO_NUMPY: dict[str, Any] = {
    "BOOL": np.bool_,
    "UINT8": np.uint8,
    "UINT16": np.uint16,
    "UINT32": np.uint32,
    "UINT64": np.uint64,
    "INT8": np.int8,
    "INT16": np.int16,
    "INT32": np.int32,
    "INT64": np.int64,
    "FP16": np.float16,
    "FP32": np.float32,
    "FP64": np.float64,
    "BYTES": np.object_,
}
_FROM_NUMPY = {np.dtype(value): name for name, value in _TO_NUMPY.items()}

#: Output types that can carry class scores.
FLOAT_TYPES = ("FP16", "FP32", "FP64")


def numpy_dtype(name: str) -> np.dtype[Any]:
    """numpy's type for a Triton type, with or without the prefix `TYPE_` of config files.

    Raises
    ------
    InputError
        If numpy has no such type (BF16) or the name is unknown.
    """
    short = short_name(name)
    if short not in _TO_NUMPY:
        raise InputError(f"The data type {name!r} is not supported.", f"Supported: {', '.join(_TO_NUMPY)}.")
    return np.dtype(_TO_NUMPY[short])


def triton_dtype(dtype: np.dtype[Any]) -> str:
    """Triton's name for a numpy type, without prefix; strings and objects are BYTES."""
    if dtype.kind in "OSU":
        return "BYTES"
    try:
        return _FROM_NUMPY[np.dtype(dtype)]
    except KeyError:
        raise InputError(f"The numpy type {dtype} has no Triton type.") from None


def short_name(name: str) -> str:
    """`FP32` for `TYPE_FP32`; `TYPE_STRING` is BYTES."""
    short = name.removeprefix("TYPE_")
    return "BYTES" if short == "STRING" else short


def config_name(short: str) -> str:
    """`TYPE_FP32` for `FP32`, as config files write it; BYTES is `TYPE_STRING`."""
    return "TYPE_STRING" if short == "BYTES" else f"TYPE_{short}"


def encode_bytes(array: NDArray[Any]) -> bytes:
    """A BYTES tensor on the wire: per element its length (4 bytes, little-endian), then the element."""
    parts = []
    for element in array.ravel():
        data = element if isinstance(element, bytes) else str(element).encode()
        parts.append(struct.pack("<I", len(data)) + data)
    return b"".join(parts)


def decode_bytes(data: bytes) -> NDArray[Any]:
    """The elements of a BYTES tensor, flat, as an object array of `bytes`."""
    elements, offset = [], 0
    while offset < len(data):
        (length,) = struct.unpack_from("<I", data, offset)
        offset += 4
        elements.append(data[offset : offset + length])
        offset += length
    found = np.empty(len(elements), dtype=np.object_)
    found[:] = elements
    return found
