"""Read tensors out of what a handler passes around, and put corrected rows back.

torch is never imported: a torch tensor is whatever has `.detach().cpu().numpy()`. Inputs are copied,
because a model may change its input in place while the verification still reads it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fides_plugins.errors import InputError
from fides_plugins.types import IntArray


def is_tensor(value: Any) -> bool:
    """Whether this is an array: numpy's, or anything with torch's `detach`."""
    return isinstance(value, np.ndarray) or hasattr(value, "detach")


def to_numpy(value: Any) -> NDArray[Any]:
    """A tensor, an array or nested lists of numbers as a numpy array (sharing memory where it can).

    Raises
    ------
    InputError
        If it is nothing of the kind.
    """
    if isinstance(value, np.ndarray):
        return value
    if hasattr(value, "detach"):
        tensor = value.detach().cpu()
        try:
            return np.asarray(tensor.numpy())
        except TypeError:  # bfloat16 has no numpy type; float32 holds every value of it
            return np.asarray(tensor.float().numpy())
    try:
        array = np.asarray(value)
    except (ValueError, TypeError, RuntimeError):
        array = np.asarray(None)
    if array.dtype.kind not in "fiub":
        raise InputError(f"A {type(value).__name__} holds no tensor of numbers.")
    return array


def query_inputs(data: Any, name: str, rank: int | None) -> dict[str, NDArray[Any]]:
    """Name to array, (N, ...) each, of what `inference()` got.

    Parameters
    ----------
    data:
        A tensor, a mapping of tensors, a tuple of tensors (named "0", "1", ...), or a list of N tensors.
    name:
        Name for a tensor that comes without one.
    rank:
        Number of axes of the input the bundle was made for, or None. It decides whether a list holds
        one tensor per row (items with one axis fewer) or several inputs.

    Raises
    ------
    InputError
        If no tensor is found.
    """
    if is_tensor(data):
        return {name: np.array(to_numpy(data))}
    if isinstance(data, Mapping):
        named = {str(k): np.array(to_numpy(v)) for k, v in data.items() if is_tensor(v)}
    elif isinstance(data, Sequence) and not isinstance(data, (str, bytes)) and any(is_tensor(v) for v in data):
        arrays = {str(i): to_numpy(v) for i, v in enumerate(data) if is_tensor(v)}
        shapes = {a.shape for a in arrays.values()}
        if len(arrays) == len(data) and len(shapes) == 1 and rank is not None and len(shapes.pop()) == rank - 1:
            return {name: np.stack(list(arrays.values()))}
        named = {key: np.array(a) for key, a in arrays.items()}
    else:
        named = {name: np.array(to_numpy(data))}
    if not named:
        raise InputError(f"inference() got a {type(data).__name__} without a tensor.")
    if len(named) == 1 and name:
        return {name: next(iter(named.values()))}
    return named


@dataclass(frozen=True)
class ClassOutput:
    """The class output inside what `inference()` returned.

    Attributes
    ----------
    array:
        (N, ...) numbers, see `OutputCodec.read`.
    whole:
        What `inference()` returned.
    key:
        Where in it the class output lies: None for the whole, an index, a key or an attribute name.
    """

    array: NDArray[Any]
    whole: Any
    key: int | str | None

    @classmethod
    def find(cls, output: Any, name: str) -> ClassOutput:
        """Find the class output by `name`: a key, an attribute, or the position in a tuple as text.

        Raises
        ------
        InputError
            If there is none of that name, or there are several and no name is set.
        """
        if is_tensor(output):
            return cls(to_numpy(output), output, None)
        if isinstance(output, Mapping):
            keys = [k for k, v in output.items() if is_tensor(v)]
            chosen = name if name else keys[0] if len(keys) == 1 else None
            if chosen is None or chosen not in output:
                raise _unknown(name, [str(k) for k in keys])
            return cls(to_numpy(output[chosen]), output, chosen)
        if name and not name.isdigit() and hasattr(output, name):
            return cls(to_numpy(getattr(output, name)), output, name)
        if isinstance(output, Sequence) and not isinstance(output, (str, bytes)) and any(map(is_tensor, output)):
            arrays = [to_numpy(v) if is_tensor(v) else None for v in output]
            if name.isdigit() and int(name) < len(arrays):
                return cls(to_numpy(output[int(name)]), output, int(name))
            # A list of one matrix is what an ONNX session returns; a list of vectors has one row per item.
            if len(arrays) == 1 and arrays[0] is not None and arrays[0].ndim == 2:
                return cls(arrays[0], output, 0)
            rows = [a for a in arrays if a is not None]
            if len(rows) == len(output) and {(a.ndim, a.shape) for a in rows} == {(1, rows[0].shape)}:
                return cls(np.stack(rows), output, None)
            raise _unknown(name, [str(i) for i, a in enumerate(arrays) if a is not None])
        return cls(to_numpy(output), output, None)

    def replaced(self, rows: IntArray, values: NDArray[Any]) -> Any:
        """What `inference()` should return instead, with `values` (R, ...) in these R rows of the class output.

        Everything else is the original object's.
        """
        if self.key is None:
            return _with_rows(self.whole, rows, values)
        indexed = isinstance(self.key, int) or isinstance(self.whole, Mapping)
        item = _with_rows(self.whole[self.key] if indexed else getattr(self.whole, str(self.key)), rows, values)
        if isinstance(self.key, str) and hasattr(self.whole, "_replace"):
            return self.whole._replace(**{self.key: item})
        if isinstance(self.whole, tuple):
            items = [item if i == self.key else v for i, v in enumerate(self.whole)]
            return type(self.whole)(*items) if hasattr(self.whole, "_fields") else tuple(items)
        changed = copy.copy(self.whole)
        if indexed:
            changed[self.key] = item
        else:
            setattr(changed, str(self.key), item)
        return changed


def _with_rows(value: Any, rows: IntArray, values: NDArray[Any]) -> Any:
    if isinstance(value, np.ndarray):
        changed = value.copy()
        changed[rows] = values.astype(changed.dtype)
        return changed
    if hasattr(value, "detach"):
        tensor = value.detach().clone()
        tensor[rows.tolist()] = tensor.new_tensor(values.tolist())
        return tensor
    items = list(value)
    for row, new in zip(rows.tolist(), values, strict=True):
        old = items[row]
        if isinstance(old, np.ndarray):
            items[row] = new.astype(old.dtype)
        else:
            items[row] = old.new_tensor(new.tolist()) if hasattr(old, "new_tensor") else new.tolist()
    return type(value)(items) if isinstance(value, tuple) else items


def _unknown(name: str, known: list[str]) -> InputError:
    what = f"no class output {name!r}" if name else "several outputs, and none is named as the class output"
    return InputError(f"inference() returned {what}; it has {sorted(known)}.", "Set `output` to one of these.")
