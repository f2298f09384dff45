"""Kinds of input, found from dtype, shape and values of the rows that a service takes.

What a changed copy of a row may look like and which small network suits it both hang on the kind: adding noise to token
ids, or normalising them, makes nonsense of them.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from fides_plugins.errors import TrainingError
from fides_plugins.training.data import image_layout

Kind = Literal["image", "vector", "tokens", "bytes", "audio"]
KINDS: tuple[Kind, ...] = get_args(Kind)

#: Fewer columns of whole numbers are codes in a table, not a sequence.
MIN_SEQUENCE = 16
#: A shorter row of floats is no sound.
MIN_SAMPLES = 400
#: Symbols of byte sequences: the bytes and one for padding.
BYTE_SYMBOLS = 257
#: So many rows are looked at.
_LOOKED_AT = 512


def input_kind(rows: NDArray[Any]) -> Kind:
    """The kind of rows (N, ...).

    Rows with the axes of a picture are images. Of flat rows, whole numbers are tokens where columns share their values
    and neighbours are unlike, as in a text; bytes where there are at most 257 of them. Floats are audio where they
    swing about zero alike in all columns and neighbours are alike, as in a waveform. All else are vectors.
    """
    if image_layout((None, *rows.shape[1:])) is not None:
        return "image"
    flat = rows[:_LOOKED_AT].reshape(min(len(rows), _LOOKED_AT), -1)
    if flat.dtype.kind in "iu" and flat.shape[1] >= MIN_SEQUENCE and flat.min() >= 0 and _is_sequence(flat):
        return "bytes" if flat.max() < BYTE_SYMBOLS else "tokens"
    if flat.dtype.kind == "f" and flat.shape[1] >= MIN_SAMPLES and _is_waveform(flat.astype(np.float64)):
        return "audio"
    return "vector"


def check_kind(kind: str, rows: NDArray[Any]) -> Kind:
    """The kind that a user names, where the rows can be that.

    Raises
    ------
    TrainingError
        If there is no such kind, or the rows have another shape or dtype.
    """
    if kind not in KINDS:
        raise TrainingError(f"There is no kind of input {kind!r}.", f"Choose one of {', '.join(KINDS)}.")
    what = f"rows of shape {rows.shape[1:]} and dtype {rows.dtype}"
    if kind == "image" and image_layout((None, *rows.shape[1:])) is None:
        raise TrainingError(f"{what} are no images.", "Images are (C, H, W), (H, W, C) or (H, W).")
    if kind in ("tokens", "bytes") and (rows.dtype.kind not in "iu" or rows.min() < 0 or rows[0].ndim != 1):
        raise TrainingError(f"{what} are no {kind}.", "They are one whole number from 0 per place.")
    return kind


def describe(kind: Kind, rows: NDArray[Any]) -> str:
    """One line about the kind that was found."""
    shape = "x".join(map(str, rows.shape[1:]))
    detail = {
        "image": f"images, {shape}",
        "vector": f"vectors of {rows[0].size} numbers",
        "tokens": f"sequences of {shape} token ids",
        "bytes": f"sequences of {shape} bytes",
        "audio": f"waveforms of {rows[0].size} samples",
    }[kind]
    return f"The inputs are {detail} ({rows.dtype})."


def padding(rows: NDArray[Any]) -> int:
    """The value that fills sequences (N, L) up: the one of the longest runs, by the sum of their squared lengths."""
    some = rows[:_LOOKED_AT]
    place = np.arange(some.shape[1])
    begins = np.diff(some, axis=1, prepend=-1) != 0
    # How far each place is into its run: these sum to half the square of its length.
    into = place - np.maximum.accumulate(np.where(begins, place, 0), axis=1)
    return int(np.bincount(some.ravel(), weights=into.ravel()).argmax())


def _is_sequence(rows: NDArray[Any]) -> bool:
    values = rows.astype(np.float64)
    left, right = values[:, :-1].ravel(), values[:, 1:].ravel()
    unlike = left != right
    if unlike.sum() < 2 or np.ptp(left[unlike]) == 0 or np.ptp(right[unlike]) == 0:
        return False
    alike = float(np.corrcoef(left[unlike], right[unlike])[0, 1])
    # Without the padding, which stands at the ends and would make columns look unlike.
    kept = values != padding(rows)
    columns = values.sum(axis=0, where=kept) / np.maximum(kept.sum(axis=0), 1)
    between = float(columns[kept.any(axis=0)].var() / max(float(values[kept].var()), 1e-12)) if kept.any() else 1.0
    return alike < 0.4 and between < 0.3


def _is_waveform(rows: NDArray[np.float64]) -> bool:
    spread = rows.std(axis=0)
    typical = float(spread.mean())
    if typical == 0 or rows.min() >= 0:
        return False
    alike = float((rows[:, 1:] * rows[:, :-1]).mean() / (rows**2).mean())
    return abs(float(rows.mean())) < 0.1 * typical and float(spread.std()) < 0.5 * typical and alike > 0.2
