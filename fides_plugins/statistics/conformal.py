"""Split-conformal p-values: how a score becomes a false-alarm budget.

Source: Vovk, Gammerman, Shafer, "Algorithmic Learning in a Random World" (2005), ch. 2; as used for
outlier detection in Bates et al., "Testing for outliers with conformal p-values" (2023).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from fides_plugins.errors import InputError
from fides_plugins.types import Float32Array, Float64Array


def rows_needed(false_alarm_rate: float) -> int:
    """Fewest calibration rows with which an alarm at this rate is possible at all: ceil(1/rate) - 1."""
    return math.ceil(1.0 / false_alarm_rate - 1e-9) - 1


class Calibration:
    """Scores of benign rows that nothing was trained on.

    Parameters
    ----------
    scores:
        (n,) numbers, higher more suspicious, of rows exchangeable with benign traffic.

    Raises
    ------
    InputError
        If there are no scores, or one is not finite.
    """

    def __init__(self, scores: ArrayLike) -> None:
        # float32, as the detectors give them: a float64 copy could differ from the very score it came
        # from in the last bit, and a tie decides between alarm and trust.
        values = np.sort(np.asarray(scores, dtype=np.float32).ravel())
        if values.size == 0 or not np.isfinite(values).all():
            raise InputError("Calibration scores are missing or not finite.", "Calibrate on benign rows.")
        values.flags.writeable = False
        self.scores: Float32Array = values

    @property
    def n(self) -> int:
        """Number of calibration rows."""
        return int(self.scores.size)

    def p_value(self, score: ArrayLike) -> Float64Array:
        """(1 + #{calibration >= score}) / (n + 1): P(p <= a) <= a for every a, on benign rows.

        NaN scores give NaN.
        """
        s = np.asarray(score, dtype=np.float32)
        p = (1.0 + self.n - np.searchsorted(self.scores, s, side="left")) / (self.n + 1.0)
        return np.where(np.isnan(s), np.nan, p)

    def threshold(self, false_alarm_rate: float) -> float:
        """The score that must be exceeded for an alarm; infinite when n is too small for the rate."""
        allowed = math.floor(false_alarm_rate * (self.n + 1) + 1e-9) - 1
        return float(self.scores[self.n - 1 - allowed]) if allowed >= 0 else math.inf

    def require(self, false_alarm_rate: float) -> None:
        """Refuse a budget that these rows cannot support.

        Raises
        ------
        InputError
            Saying how many calibration rows are needed.
        """
        needed = rows_needed(false_alarm_rate)
        if self.n < needed:
            raise InputError(
                f"A false-alarm rate of {false_alarm_rate:g} needs at least {needed} calibration rows; "
                f"there are {self.n}.",
                "Calibrate on more rows, or allow a higher rate.",
            )
