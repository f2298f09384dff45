"""Array types of the package, and the checks that every object of `fides_plugins.types` makes of its arrays."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fides_plugins.errors import InputError

Float32Array = NDArray[np.float32]
Float64Array = NDArray[np.float64]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]
OutputKind = Literal["logits", "probabilities"]
#: Which rows: a slice, indices or a mask, as numpy takes them.
Rows = slice | IntArray | BoolArray

#: A row of claimed probabilities may miss a sum of one by this much (float16 services over 1,000 classes do).
SUM_TOLERANCE = 1e-2

EMPTY: Mapping[str, Any] = MappingProxyType({})


def frozen(array: NDArray[Any]) -> NDArray[Any]:
    """A read-only view, not a copy: whoever made the array must not change it any more either."""
    view = array.view()
    view.flags.writeable = False
    return view


def set_field(instance: object, name: str, value: object) -> None:
    """Set a field of a frozen dataclass, from its own constructor only."""
    object.__setattr__(instance, name, value)


def class_matrix(values: ArrayLike, what: str) -> Float32Array:
    array = np.ascontiguousarray(values, dtype=np.float32)
    if array.ndim != 2:
        raise InputError(
            f"{what} has shape {array.shape}; expected two dimensions (rows, classes).",
            "Reshape it so that there is one row per input and one column per class.",
        )
    if array.shape[1] < 2:
        raise InputError(f"{what} has {array.shape[1]} class(es); at least 2 are needed.")
    return array


def column(values: ArrayLike, n: int, dtype: Any, what: str) -> NDArray[Any]:
    array = np.ascontiguousarray(values, dtype=dtype)
    if array.shape != (n,):
        raise InputError(f"{what} has shape {array.shape}; expected ({n},), one value per row.")
    return frozen(array)


def row_mask(values: ArrayLike | None, n: int, what: str) -> BoolArray:
    if values is None:
        return frozen(np.ones(n, dtype=np.bool_))
    return column(values, n, np.bool_, what)


def softmax(logits: ArrayLike, axis: int = -1) -> Float32Array:
    """Softmax over `axis`, computed in float64 and returned as float32.

    Rows with a NaN or an infinity come out as NaN; the caller decides what that means.
    """
    z = np.asarray(logits, dtype=np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        z = z - np.max(z, axis=axis, keepdims=True) if z.size else z
        e = np.exp(z)
        total = np.sum(e, axis=axis, keepdims=True)
        return np.asarray(e / total if e.size else e, dtype=np.float32)
