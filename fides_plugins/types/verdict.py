"""The outcome: a status for every row, and what the caller should use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fides_plugins.errors import InputError
from fides_plugins.types.arrays import BoolArray, Float32Array, IntArray, Rows, class_matrix, column, frozen, set_field


class Status(IntEnum):
    """Verdict of one row. The numbers do not rank them."""

    TRUSTED = 0
    ATTACKED = 1
    INDETERMINATE = 2
    ERROR = 3

    @property
    def text(self) -> str:
        """Lower-case name, as it appears in headers, tensors and records."""
        return self.name.lower()


STATUS_TEXTS: tuple[str, ...] = tuple(s.text for s in Status)
_STATUS_TEXT_ARRAY = np.array(STATUS_TEXTS)


@dataclass(frozen=True, eq=False)
class Verdict:
    """The outcome for a batch, and what the caller should use.

    Attributes
    ----------
    status:
        (N,) uint8, values of `Status`.
    score:
        (N,) float32 in [0, 1], NaN where no detector had an opinion. Higher is more suspicious.
    p_value:
        (N,) float32, combined over detectors; NaN where none is calibrated.
    service_label, verified_label:
        (N,) int64: top class of the service and of the reference; -1 where there is none.
    label, probabilities:
        (N,) int64 and (N, K) float32: what the caller should use. The service's answer, or for attacked
        rows the re-classified one, in every mode; only in `correct` does a host write it into the class
        output. -1 and zeros where there is nothing to use.
    corrected:
        (N,) bool: the row carries a re-classified answer.
    refused:
        (N,) bool: policy refuses this row; a host must not hand out its answer.
    reason_codes, reasons:
        (N,) int64 into a tuple of distinct texts, so that building reasons needs no loop over rows.
    """

    status: NDArray[np.uint8]
    score: Float32Array
    p_value: Float32Array
    service_label: IntArray
    verified_label: IntArray
    label: IntArray
    probabilities: Float32Array
    corrected: BoolArray
    refused: BoolArray
    reason_codes: IntArray
    reasons: tuple[str, ...]

    def __post_init__(self) -> None:
        probabilities = class_matrix(self.probabilities, "Verdict.probabilities")
        n = len(probabilities)
        set_field(self, "probabilities", frozen(probabilities))
        columns: dict[str, Any] = {
            "status": np.uint8,
            "score": np.float32,
            "p_value": np.float32,
            "service_label": np.int64,
            "verified_label": np.int64,
            "label": np.int64,
            "corrected": np.bool_,
            "refused": np.bool_,
            "reason_codes": np.int64,
        }
        for name, dtype in columns.items():
            set_field(self, name, column(getattr(self, name), n, dtype, f"Verdict.{name}"))
        if n and (self.reason_codes.min() < 0 or self.reason_codes.max() >= len(self.reasons)):
            raise InputError("Verdict.reason_codes point outside Verdict.reasons.")

    @classmethod
    def concat(cls, parts: Sequence[Verdict]) -> Verdict:
        """The rows of several verdicts over the same classes, in order."""
        if len(parts) == 1:
            return parts[0]
        columns = {f.name: np.concatenate([getattr(p, f.name) for p in parts]) for f in _columns()}
        starts = np.cumsum([0, *(len(p.reasons) for p in parts)])
        codes = np.concatenate([p.reason_codes + start for p, start in zip(parts, starts, strict=False)])
        return cls(**{**columns, "reason_codes": codes}, reasons=tuple(r for p in parts for r in p.reasons))

    def rows(self, index: Rows) -> Verdict:
        """Some of the rows."""
        return replace(self, **{f.name: getattr(self, f.name)[index] for f in _columns()})

    @property
    def n_rows(self) -> int:
        """N, the number of rows."""
        return int(self.status.shape[0])

    @property
    def status_text(self) -> NDArray[np.str_]:
        """(N,) strings: trusted, attacked, indeterminate or error."""
        return np.asarray(_STATUS_TEXT_ARRAY[self.status])

    @property
    def reason(self) -> NDArray[np.str_]:
        """(N,) strings: why each row has its status; empty for a trusted row."""
        return np.asarray(np.array(self.reasons or ("",))[self.reason_codes])

    def counts(self) -> dict[str, int]:
        """Number of rows by status text."""
        return dict(zip(STATUS_TEXTS, np.bincount(self.status, minlength=len(STATUS_TEXTS)).tolist(), strict=True))


def _columns() -> list[Any]:
    return [f for f in fields(Verdict) if f.name != "reasons"]
