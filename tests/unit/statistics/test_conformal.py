from __future__ import annotations

import numpy as np
import pytest

from fides_plugins.errors import InputError
from fides_plugins.statistics.conformal import Calibration, rows_needed


def test_p_values_by_hand():
    calibration = Calibration([0.1, 0.2, 0.3, 0.4])
    np.testing.assert_allclose(calibration.p_value([0.0, 0.2, 0.25, 0.4, 0.9]), [1.0, 0.8, 0.6, 0.4, 0.2])
    assert np.isnan(calibration.p_value([np.nan])).all()


@pytest.mark.parametrize("rate", [0.01, 0.02, 0.05, 0.1, 0.3])
@pytest.mark.parametrize("n", [19, 99, 100, 463])
def test_threshold_and_p_value_agree(rate: float, n: int):
    rng = np.random.default_rng(n)
    calibration = Calibration(np.round(rng.random(n), 2))
    scores = np.round(rng.random(2000), 2).astype(np.float32)
    np.testing.assert_array_equal(calibration.p_value(scores) <= rate, scores > calibration.threshold(rate))


def test_the_false_alarm_rate_is_a_bound_on_average_over_calibrations():
    rng = np.random.default_rng(0)
    rates = [(Calibration(rng.random(99)).p_value(rng.random(1000)) <= 0.05).mean() for _ in range(400)]
    # The mean of 400 draws of a Beta(5, 95)-like rate has a standard error of about 0.0011.
    assert np.mean(rates) == pytest.approx(0.05, abs=0.004)


@pytest.mark.parametrize(("rate", "needed"), [(0.01, 99), (0.02, 49), (0.05, 19), (1 / 3, 2)])
def test_rows_needed_is_exact(rate: float, needed: int):
    assert rows_needed(rate) == needed
    assert Calibration(np.zeros(needed)).p_value([1.0])[0] <= rate
    assert Calibration(np.zeros(needed - 1)).p_value([1.0])[0] > rate
    with pytest.raises(InputError, match=f"at least {needed} calibration rows"):
        Calibration(np.zeros(needed - 1)).require(rate)


@pytest.mark.parametrize("scores", [[], [np.nan], [1.0, np.inf]])
def test_scores_must_be_there_and_finite(scores: list[float]):
    with pytest.raises(InputError, match="missing or not finite"):
        Calibration(scores)
