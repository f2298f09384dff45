"""Temperatures, the balanced threshold, and the benign scores behind a false-alarm budget.

The p-values themselves are in `fides_plugins.statistics.conformal`, because serving needs them too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike

from fides_plugins.errors import TrainingError
from fides_plugins.onnx_model import OnnxModel
from fides_plugins.statistics import divergences
from fides_plugins.statistics.conformal import rows_needed
from fides_plugins.training.predictions import Predictions, run_graph
from fides_plugins.types import Float32Array, Float64Array, IntArray

#: Name of the learned detector among the calibrations.
LEARNED = "learned"
_TEMPERATURES = (0.1, 20.0)


def fit_temperature(probabilities: ArrayLike, labels: IntArray, floor: float = 1e-30) -> float:
    """The temperature T that makes softmax(log(p + floor) / T) most likely to have given `labels`.

    Guo et al., "On Calibration of Modern Neural Networks" (ICML 2017), with probabilities in place of
    logits, which differ from their logarithm by a constant per row only.

    Parameters
    ----------
    probabilities:
        (N, K).
    labels:
        (N,) class indices.
    floor:
        As `TemperatureScaling` adds it.

    Returns
    -------
    T in [0.1, 20].
    """
    logs = np.log(np.asarray(probabilities, np.float32) + np.float32(floor))
    rows = np.arange(len(logs))

    def loss(log_t: float) -> float:
        z = logs * np.float32(math.exp(-log_t))
        z -= z.max(axis=1, keepdims=True)
        return float((np.log(np.exp(z).sum(axis=1)) - z[rows, labels]).mean())

    # Golden-section search: the loss is convex in 1 / T, so unimodal in log T.
    low, high = (math.log(t) for t in _TEMPERATURES)
    ratio = (math.sqrt(5.0) - 1.0) / 2.0
    a, b = high - ratio * (high - low), low + ratio * (high - low)
    loss_a, loss_b = loss(a), loss(b)
    for _ in range(24):
        if loss_a < loss_b:
            high, b, loss_b = b, a, loss_a
            a = high - ratio * (high - low)
            loss_a = loss(a)
        else:
            low, a, loss_a = a, b, loss_b
            b = low + ratio * (high - low)
            loss_b = loss(b)
    return math.exp((low + high) / 2.0)


def balanced_threshold(benign: ArrayLike, attacked: Mapping[str, ArrayLike]) -> float:
    """The score above which calling a row attacked is right most often at 1 : 1.

    Parameters
    ----------
    benign:
        (n,) scores.
    attacked:
        Scores by attack; every attack counts the same, however many rows it has.

    Returns
    -------
    Midway between two neighbouring scores.
    """
    clean = np.sort(np.asarray(benign, np.float64))
    lies = [np.sort(np.asarray(a, np.float64)) for a in attacked.values() if len(np.asarray(a))]
    if not lies:
        return float(clean[-1])
    candidates = np.unique(np.concatenate([clean, *lies]))
    kept = np.searchsorted(clean, candidates, side="right") / len(clean)
    caught = np.mean([1.0 - np.searchsorted(a, candidates, side="right") / len(a) for a in lies], axis=0)
    best = int(np.argmax(_smooth(kept + caught)))
    following = candidates[min(best + 1, len(candidates) - 1)]
    return float((candidates[best] + following) / 2.0)


def _smooth(values: Float64Array) -> Float64Array:
    """Running mean over 2% of the candidates, so that a single lucky row doesn't choose the threshold."""
    width = max(1, len(values) // 50) | 1
    padded = np.pad(values, width // 2, mode="edge")
    return np.asarray(np.convolve(padded, np.full(width, 1.0 / width), mode="valid"))


def benign_scores(detector: OnnxModel, rows: Predictions) -> dict[str, Float32Array]:
    """Scores of benign rows, by the learned detector and by every named divergence.

    Parameters
    ----------
    detector:
        The exported graph: the very one that serves.
    rows:
        Rows that nothing was trained on.
    """
    scores = {LEARNED: run_graph(detector, "score", service=rows.service, verification=rows.verification)}
    for name in divergences.DIVERGENCES:
        scores[name] = divergences.score(name, rows.service, rows.verification)
    return scores


def require_rows(n_calibration: int, calibration_fraction: float, false_alarm_rate: float) -> None:
    """Refuse to fit where the budget could never be honoured.

    Raises
    ------
    TrainingError
        Saying how many rows are needed.
    """
    needed = rows_needed(false_alarm_rate)
    if n_calibration < needed:
        total = math.ceil(needed / calibration_fraction)
        raise TrainingError(
            f"A false-alarm rate of {false_alarm_rate:g} needs at least {needed} calibration rows; "
            f"this split leaves {n_calibration}.",
            f"Give at least {total} rows, or allow a higher rate.",
        )
