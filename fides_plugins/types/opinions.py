"""What detectors and re-classifiers think of an answer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from fides_plugins.errors import InputError
from fides_plugins.types.answers import Prediction
from fides_plugins.types.arrays import BoolArray, Float32Array, IntArray, Rows, column, frozen, row_mask, set_field


@dataclass(frozen=True, eq=False)
class Detection:
    """One detector's opinion on a batch.

    Attributes
    ----------
    score:
        (N,) float32 in [0, 1]; higher is more suspicious.
    attacked:
        (N,) bool: the detector's own decision at its own threshold.
    p_value:
        (N,) float32 in [0, 1]: probability of a score at least this high on benign traffic; NaN where
        the detector is not calibrated. With p-values the policy's false-alarm budget decides, without
        them `attacked` does.
    source:
        Name of the detector, for reasons.
    valid:
        (N,) bool: False where the detector has no opinion.
    unscored:
        (N,) bool: rows that were given as valid with a score that is not a finite number. They are not
        `valid`, and the pipeline counts them as failures of the detector: only `valid=False` says "no opinion".
    """

    score: Float32Array
    attacked: BoolArray
    p_value: Float32Array
    source: str
    valid: BoolArray
    unscored: BoolArray

    def __init__(
        self,
        score: ArrayLike,
        attacked: ArrayLike,
        source: str,
        p_value: ArrayLike | None = None,
        valid: ArrayLike | None = None,
    ) -> None:
        scores = np.ascontiguousarray(score, dtype=np.float32)
        n = scores.shape[0] if scores.ndim == 1 else -1
        if n < 0:
            raise InputError(f"The score of {source!r} has shape {scores.shape}; expected (rows,).")
        given = row_mask(valid, n, "Detection.valid")
        ok = given & np.isfinite(scores)
        p = np.full(n, np.nan, dtype=np.float32) if p_value is None else p_value
        p = column(p, n, np.float32, "Detection.p_value")
        with np.errstate(invalid="ignore"):
            if np.any((p < 0) | (p > 1)):
                raise InputError(f"A p-value of {source!r} lies outside [0, 1].")
            if np.any(ok & ((scores < 0) | (scores > 1))):
                raise InputError(f"A score of {source!r} lies outside [0, 1].")
        set_field(self, "score", frozen(np.where(ok, scores, np.float32(np.nan)).astype(np.float32)))
        set_field(self, "attacked", column(attacked, n, np.bool_, "Detection.attacked"))
        set_field(self, "p_value", p)
        set_field(self, "source", source)
        set_field(self, "valid", frozen(np.asarray(ok)))
        set_field(self, "unscored", frozen(np.asarray(given & ~ok)))

    @property
    def n_rows(self) -> int:
        """N, the number of rows."""
        return int(self.score.shape[0])

    def rows(self, index: Rows) -> Detection:
        """Some of the rows; those without a score keep it missing."""
        valid = self.valid[index]
        score = np.where(valid | self.unscored[index], self.score[index], np.float32(0))
        return Detection(score, self.attacked[index], self.source, self.p_value[index], valid | self.unscored[index])


@dataclass(frozen=True, eq=False)
class Reclassification:
    """What the un-attacked service would have answered.

    Attributes
    ----------
    probabilities:
        (N, K) float32, rows sum to one.
    source:
        Name of the re-classifier.
    valid:
        (N,) bool: False where there is no correction, or it was not a distribution.
    """

    probabilities: Float32Array
    source: str
    valid: BoolArray

    def __init__(self, probabilities: ArrayLike, source: str, valid: ArrayLike | None = None) -> None:
        checked = Prediction.from_output(probabilities, "probabilities")
        mask = row_mask(valid, checked.n_rows, "Reclassification.valid")
        set_field(self, "probabilities", checked.probabilities)
        set_field(self, "source", source)
        set_field(self, "valid", frozen(np.asarray(mask & checked.valid)))

    @property
    def n_rows(self) -> int:
        """N, the number of rows."""
        return int(self.probabilities.shape[0])

    @property
    def label(self) -> IntArray:
        """(N,) int64: corrected class; -1 where there is no correction."""
        return np.where(self.valid, self.probabilities.argmax(axis=1), -1)
