"""gRPC messages before they are parsed: protobuf turns two bytes into an object of a hundred.

A message is walked over, field by field and without copying it, and refused where it has more fields or numbers
than a request needs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from google.protobuf.descriptor import FieldDescriptor

from fides_plugins.enclave.bounds import HEAD_VALUES
from fides_plugins.errors import InputError

_VARINT, _FIXED_64, _LENGTH, _FIXED_32 = 0, 1, 2, 5
#: Types of the protocol's fields that take no more room than their bytes.
_AS_LONG = (
    FieldDescriptor.TYPE_STRING,
    FieldDescriptor.TYPE_BYTES,
    FieldDescriptor.TYPE_DOUBLE,
    FieldDescriptor.TYPE_FLOAT,
)


def check_message(data: bytes, kind: Any, values: int) -> None:
    """Refuse a message that would become more than a request needs.

    Parameters
    ----------
    data:
        The message as it came.
    kind:
        Its descriptor.
    values:
        Numbers that it may have.

    Raises
    ------
    InputError
        If it has too many fields or numbers, or ends within one.
    """
    try:
        _Count(HEAD_VALUES, values + HEAD_VALUES).message(memoryview(data), kind)
    except IndexError:
        raise InputError("The message ends too early.") from None


class _Count:
    """What is left of the fields and numbers that a message may have."""

    def __init__(self, fields: int, values: int) -> None:
        self._fields = fields
        self._values = values

    def message(self, data: memoryview, kind: Any) -> None:
        """Count the fields of a message, and of those in it."""
        position = 0
        while position < len(data):
            self._fields -= 1
            tag, position = _varint(data, position)
            wire = tag & 7
            if wire == _VARINT:
                _, position = _varint(data, position)
            elif wire == _FIXED_64:
                position += 8
            elif wire == _FIXED_32:
                position += 4
            elif wire == _LENGTH:
                length, position = _varint(data, position)
                self._part(data[position : position + length], kind.fields_by_number.get(tag >> 3))
                position += length
            else:
                raise InputError("The message has groups, which the protocol does not have.")
            if self._fields < 0 or self._values < 0:
                raise InputError("The message has more fields or numbers than any request needs.")
        if position > len(data):
            raise IndexError

    def _part(self, data: memoryview, field: Any) -> None:
        if field is None:
            return
        if field.message_type is not None:
            self.message(data, field.message_type)
        elif field.type not in _AS_LONG:
            # Numbers of variable length: the last byte of each is below 128.
            self._values -= int(np.count_nonzero(np.frombuffer(data, np.uint8) < 128))


def _varint(data: memoryview, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
    raise InputError("A number in the message has more than ten bytes.")
