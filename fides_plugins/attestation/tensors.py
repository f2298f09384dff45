"""Digests of tensors: what client, host and enclave compute independently.

A digest covers data type and shape as well as the bytes, so that the same bytes cannot be presented as
another tensor. Data types carry their names of the Open Inference Protocol.
"""

from __future__ import annotations

import hashlib
import struct
from typing import Any

from numpy.typing import NDArray

from fides_plugins.oip import oip_type, tensor_bytes

_DOMAIN = b"fides-tensor/1"


def bytes_digest(data: bytes, dtype: str, shape: tuple[int, ...]) -> bytes:
    """SHA-256 over domain tag, type, shape and bytes of a tensor; 32 bytes."""
    digest = hashlib.sha256(_DOMAIN)
    name = dtype.encode("ascii")
    digest.update(struct.pack(f"<B{len(name)}sB{len(shape)}Q", len(name), name, len(shape), *shape))
    digest.update(data)
    return digest.digest()


def tensor_digest(array: NDArray[Any]) -> bytes:
    """`bytes_digest` of an array: what a client computes over its own input; 32 bytes.

    Raises
    ------
    InputError
        For types of variable width, which have no bytes of their own to hash.
    """
    return bytes_digest(tensor_bytes(array), oip_type(array.dtype), array.shape)
