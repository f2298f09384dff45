"""How large a request may be: what the largest honest one needs, by the bundle's input and the largest batch.

Size alone bounds no memory, because parsers turn few bytes into many: three of JSON (`[],`) become eighty. What a
parser would make is therefore counted before it runs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from fides_plugins.bundle import InputSpec
from fides_plugins.errors import InputError

#: Names, shapes, the signed request and punctuation around the numbers: bytes, and values or objects.
_HEAD_BYTES = 64 << 10
_HEAD_VALUES = 256
#: Ceilings where the input is large or has free axes; more comes in smaller batches, or in binary.
_MOST_BYTES = 24 << 20
_MOST_VALUES = 1 << 21
_MOST_LISTS = 1 << 19
#: The longest number of a type with its comma and blank, as `json.dumps` writes it.
_FLOAT_TEXT = len("-2.2250738585072014e-308, ")
_BOOL_TEXT = len("false, ")


@dataclass(frozen=True)
class RequestBounds:
    """What one request may hold.

    Attributes
    ----------
    body_bytes:
        A whole body.
    json_bytes:
        The JSON of a body.
    values, lists:
        Numbers and lists that JSON may become.
    """

    body_bytes: int
    json_bytes: int
    values: int
    lists: int

    def check_json(self, text: bytes) -> None:
        """Refuse JSON that would become more than a request needs.

        Raises
        ------
        InputError
            If it is too long, or has too many values, lists or objects.
        """
        if len(text) > self.json_bytes:
            raise InputError(f"The JSON is longer than {self.json_bytes} bytes.", "Send the tensor in binary.")
        # One wide character makes Python store its whole text in four bytes a character.
        if len(text) > _HEAD_BYTES and (not text.isascii() or b"\\u" in text):
            raise InputError(
                f"JSON of more than {_HEAD_BYTES} bytes must be ASCII without escapes.", "Send the tensor in binary."
            )
        counted = ((b",", self.values), (b"[", self.lists), (b"{", 0))
        if any(text.count(mark) > most + _HEAD_VALUES for mark, most in counted):
            raise InputError("The JSON has more values than any request needs.", "Send the tensor in binary.")


def request_bounds(spec: InputSpec, max_rows: int, body_bytes: int | None = None) -> RequestBounds:
    """The bounds for one input.

    Parameters
    ----------
    spec:
        The input; where an axis besides the rows is free, the ceilings of this module apply.
    max_rows:
        Rows of the largest batch.
    body_bytes:
        Largest body, where the operator chose one; derived from the input otherwise.
    """
    axes = spec.shape[1:]
    sizes = [size for size in axes if size is not None]
    dtype = np.dtype(spec.dtype)
    if len(sizes) == len(axes):
        needed = max_rows * math.prod(sizes)
        values = min(_MOST_VALUES, needed)
        # One list for the batch, then one for each row, each row's part, and so on.
        lists = min(_MOST_LISTS, 1 + sum(max_rows * math.prod(sizes[:depth]) for depth in range(len(sizes))))
        raw = needed * dtype.itemsize
    else:
        values, lists, raw = _MOST_VALUES, _MOST_LISTS, _MOST_BYTES
    text = values * _text_bytes(dtype) + lists * len("[], ") + _HEAD_BYTES
    body = body_bytes or min(_MOST_BYTES, max(raw + _HEAD_BYTES, text))
    return RequestBounds(body, min(body, text), values, lists)


def _text_bytes(dtype: np.dtype[Any]) -> int:
    if dtype.kind in "iu":
        info = np.iinfo(dtype)
        return max(len(str(info.min)), len(str(info.max))) + len(", ")
    return _BOOL_TEXT if dtype.kind == "b" else _FLOAT_TEXT
