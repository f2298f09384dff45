"""How fast the sequence test alarms under attack, and how often on benign traffic."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from fides_plugins.statistics.intervals import wilson
from fides_plugins.statistics.monitor import EProcess
from fides_plugins.training.evaluation.measures import DRAWS, LEVELS, Estimate
from fides_plugins.types import Float64Array, IntArray


@dataclass(frozen=True)
class MonitorStudy:
    """Size of the study.

    Attributes
    ----------
    error:
        Of the test.
    fractions:
        Shares of attacked requests.
    sequences, length:
        Attacked sequences for each share, and their rows; a sequence without alarm counts as never.
    clean_sequences, clean_length:
        Benign sequences and their rows.
    seed:
        Of the sequences.
    """

    error: float = 1e-6
    fractions: tuple[float, ...] = (1.0, 0.5, 0.2, 0.1)
    sequences: int = 200
    length: int = 1000
    clean_sequences: int = 200
    clean_length: int = 2000
    seed: int = 0


def study_monitor(
    clean: Float64Array, attacked: Float64Array, n_calibration: int, study: MonitorStudy
) -> dict[str, Any]:
    """Run the sequence test on rows drawn with replacement.

    Parameters
    ----------
    clean, attacked:
        (n,), (m,) conformal p-values of benign and attacked rows.
    n_calibration:
        Calibration rows behind them.

    Returns
    -------
    {"1.0": {"median", "p95", "alarmed"}, ..., "false_alarms"}: requests until the alarm, the alarming one
    included. None where more than half (or 5%) of the sequences never alarmed. `false_alarms` and its interval
    count sequences; intervals of counts and shares are Wilson's, and tell of more sequences from these rows.
    """
    rng = np.random.default_rng(study.seed)

    def delays_at(fraction: float, sequences: int, length: int) -> Float64Array:
        traffic = _traffic(clean, attacked, fraction, sequences, length, rng)
        return first_alarms(traffic, n_calibration, sequences, study.error)

    result: dict[str, Any] = {}
    for fraction in study.fractions:
        delays = delays_at(fraction, study.sequences, study.length)
        result[str(fraction)] = {
            **_quantile(delays, 50.0, rng).to_json("median"),
            **_quantile(delays, 95.0, rng).to_json("p95"),
            **Estimate.share(np.isfinite(delays)).to_json("alarmed"),
        }
    alarms = np.isfinite(delays_at(0.0, study.clean_sequences, study.clean_length))
    result["false_alarms"] = int(alarms.sum())
    result["false_alarms_interval"] = [round(len(alarms) * x, 6) for x in wilson(alarms.sum(), len(alarms))]
    result.update(error=study.error, clean_sequences=study.clean_sequences, clean_rows=study.clean_length)
    return result


def first_alarms(p_values: Iterable[Float64Array], n_calibration: int, sequences: int, error: float) -> Float64Array:
    """Requests until the sequence test alarms, the alarming one included.

    Parameters
    ----------
    p_values:
        At each step (sequences,) conformal p-values, one for each sequence.
    n_calibration:
        Calibration rows behind them.
    error:
        Of the test.

    Returns
    -------
    (sequences,) float64, infinite where there was no alarm.
    """
    process = EProcess(n_calibration, sequences)
    delays = np.full(sequences, np.inf)
    for t, p in enumerate(p_values):
        alarmed = process.step(p) >= 1.0 / error
        delays[alarmed & np.isinf(delays)] = t + 1
        if np.isfinite(delays).all():
            break
    return delays


def _traffic(
    clean: Float64Array, attacked: Float64Array, fraction: float, sequences: int, length: int, rng: np.random.Generator
) -> Iterator[Float64Array]:
    """`length` times (sequences,) p-values drawn with replacement, a fraction of them from attacked rows."""
    for _ in range(length):
        p = clean[rng.integers(len(clean), size=sequences)]
        if fraction > 0:
            lies: IntArray = rng.integers(len(attacked), size=sequences)
            p = np.where(rng.random(sequences) < fraction, attacked[lies], p)
        yield p


def _quantile(delays: Float64Array, q: float, rng: np.random.Generator) -> Estimate:
    """A quantile of delays with its bootstrap interval; NaN where it is infinite."""
    picks = rng.integers(len(delays), size=(DRAWS, len(delays)))
    draws = np.percentile(delays[picks], q, axis=1, method="higher")
    # Draws that never alarm count: without them the interval would end where the study happened to.
    low = np.percentile(draws, LEVELS[0], method="lower")
    high = np.percentile(draws, LEVELS[1], method="higher")
    found = (np.percentile(delays, q, method="higher"), low, high)
    return Estimate(*(float(x) if np.isfinite(x) else float("nan") for x in found))
