"""Measures of a detector and their 95% intervals.

A share of independent rows has Wilson's interval (`statistics.intervals`). Everything else has a bootstrap interval.
A draw weighs *input rows*: a row's clean and attacked answers go in or out together, because they are not
independent. All measures are computed for all draws at once from sorted scores.

Where no draw differs, a bootstrap says that the measure is certain, and it is not: what would change it was
only not among the rows. There the interval reaches as far as Wilson's for something seen in none of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fides_plugins.statistics.intervals import wilson
from fides_plugins.types import Float64Array, IntArray

DRAWS = 400
#: Percentiles of the draws at which an interval ends.
LEVELS = (2.5, 97.5)
#: Weights take draws x rows bytes; with more rows fewer draws are made.
_MAX_WEIGHTS = 40_000_000


@dataclass(frozen=True)
class Estimate:
    """A measure with its 95% interval."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, draws: Float64Array, rows: float = 0, bounds: tuple[float, float] = (0.0, 1.0)) -> Estimate:
        """A bootstrap estimate.

        Parameters
        ----------
        draws:
            The values of all draws; the first is the one of the rows themselves.
        rows:
            Independent rows behind it; 0 leaves an interval alone that no draw widens.
        bounds:
            Smallest and largest value the measure can have.
        """
        value = float(draws[0])
        if np.isnan(value):
            return cls(value, value, value)
        low, high = (float(x) for x in np.nanpercentile(draws[1:], LEVELS))
        if rows and (low == high or value in bounds):
            unseen = wilson(0, rows)[1]
            low, high = max(bounds[0], min(low, value - unseen)), min(bounds[1], max(high, value + unseen))
        return cls(value, low, high)

    @classmethod
    def share(cls, hits: ArrayLike) -> Estimate:
        """The share of independent rows (n,) that are hits, with Wilson's interval."""
        found = np.asarray(hits)
        return cls(float(found.mean()), *wilson(float(found.sum()), len(found)))

    def to_json(self, name: str) -> dict[str, Any]:
        """{name: value, name_interval: [low, high]}; NaN becomes None."""

        def plain(x: float) -> float | None:
            return None if np.isnan(x) else round(x, 6)

        return {name: plain(self.value), f"{name}_interval": [plain(self.low), plain(self.high)]}


def bootstrap_weights(n_rows: int, seed: int = 0, draws: int = DRAWS) -> NDArray[np.float32]:
    """(draws + 1, n) weights: ones first, then counts of n draws with replacement."""
    draws = max(50, min(draws, _MAX_WEIGHTS // max(n_rows, 1)))
    rng = np.random.default_rng(seed)
    weights = np.ones((draws + 1, n_rows), dtype=np.float32)
    for row in weights[1:]:
        row[:] = np.bincount(rng.integers(n_rows, size=n_rows), minlength=n_rows)
    return weights


def mean(values: ArrayLike, weights: NDArray[np.float32]) -> Float64Array:
    """(draws,) weighted means of values (n,); NaN where nothing has weight."""
    total = weights.sum(axis=1, dtype=np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray((weights @ np.asarray(values, dtype=np.float32)).astype(np.float64) / total)


class Scores:
    """Benign and attacked scores of the same input rows, sorted once.

    Parameters
    ----------
    benign:
        (n,) scores.
    attacked:
        (m,) scores.
    rows:
        (m,) which input row each attacked score belongs to.
    weights:
        (draws, n) from `bootstrap_weights`.
    """

    def __init__(self, benign: ArrayLike, attacked: ArrayLike, rows: IntArray, weights: NDArray[np.float32]) -> None:
        self.benign, self.attacked = np.asarray(benign, np.float64), np.asarray(attacked, np.float64)
        self.benign_weight, self.attacked_weight = weights, weights[:, rows]
        order = np.argsort(-self.benign, kind="stable")
        self._benign_sorted = self.benign[order]
        self._benign_above = np.cumsum(weights[:, order], axis=1, dtype=np.float64)
        order = np.argsort(-self.attacked, kind="stable")
        self._attacked_sorted = self.attacked[order]
        above = np.cumsum(self.attacked_weight[:, order], axis=1, dtype=np.float64)
        self._attacked_above = np.concatenate([np.zeros((len(weights), 1)), above], axis=1)
        self._benign_total = weights.sum(axis=1, dtype=np.float64)
        self._attacked_total = self.attacked_weight.sum(axis=1, dtype=np.float64)

    def tpr_at(self, fpr: float | Float64Array) -> Float64Array:
        """(draws,) share of attacked rows above the lowest threshold whose false-alarm rate is at most `fpr`.

        NaN where the benign rows are too few for one of them to be above it: the rate would be 0, not `fpr`.
        """
        allowed = np.floor(np.asarray(fpr) * self._benign_total + 1e-6)
        # The threshold is the first benign score that no longer fits into the budget: it must be exceeded.
        first_out = np.array([np.searchsorted(c, a, side="right") for c, a in self._pairs(allowed)])
        first_out = np.minimum(first_out, len(self._benign_sorted) - 1)
        threshold = self._benign_sorted[first_out]
        caught = np.searchsorted(-self._attacked_sorted, -threshold, side="left")
        share = self._share(self._attacked_above, caught, self._attacked_total)
        return np.where((np.asarray(fpr) > 0) & (allowed < 1), np.nan, share)

    def auroc(self) -> Float64Array:
        """(draws,) area under the ROC curve; ties count one half."""
        ascending = self._benign_sorted[::-1]
        weight = self.benign_weight[:, np.argsort(-self.benign, kind="stable")][:, ::-1]
        below = np.concatenate([np.zeros((len(weight), 1)), np.cumsum(weight, axis=1, dtype=np.float64)], axis=1)
        left = np.searchsorted(ascending, self.attacked, side="left")
        right = np.searchsorted(ascending, self.attacked, side="right")
        wins = 0.5 * (below[:, left] + below[:, right])
        with np.errstate(invalid="ignore", divide="ignore"):
            area = (wins * self.attacked_weight).sum(axis=1) / (self._benign_total * self._attacked_total)
        return np.asarray(area)

    def above(self, threshold: float) -> tuple[Float64Array, Float64Array]:
        """(draws,) false-alarm and true-alarm rate of `score > threshold`."""
        return (
            mean(self.benign > threshold, self.benign_weight),
            mean(self.attacked > threshold, self.attacked_weight),
        )

    def roc(self, points: int = 200) -> tuple[list[float], list[float]]:
        """A thinned ROC curve of the rows themselves, (0, 0) and (1, 1) included."""
        thresholds = np.unique(np.concatenate([self.benign, self.attacked]))[::-1]
        fpr = 1.0 - np.searchsorted(np.sort(self.benign), thresholds, side="right") / len(self.benign)
        tpr = 1.0 - np.searchsorted(np.sort(self.attacked), thresholds, side="right") / max(len(self.attacked), 1)
        fpr, tpr = np.append(fpr, 1.0), np.append(tpr, 1.0)
        # Dense where the false-alarm rate is small: that part of the curve is the one that matters.
        wanted = np.concatenate([np.linspace(0, 0.1, points // 2), np.linspace(0.1, 1, points // 2)])
        index = np.clip(np.searchsorted(fpr, wanted, side="right") - 1, 0, len(fpr) - 1)
        return [0.0, *fpr[index].tolist()], [0.0, *tpr[index].tolist()]

    def _pairs(self, allowed: Float64Array) -> zip[tuple[Float64Array, float]]:
        return zip(self._benign_above, np.broadcast_to(allowed, self._benign_total.shape), strict=True)

    @staticmethod
    def _share(cumulative: Float64Array, index: IntArray, total: Float64Array) -> Float64Array:
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray(cumulative[np.arange(len(cumulative)), index] / total)
