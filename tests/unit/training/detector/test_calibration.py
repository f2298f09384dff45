"""Temperatures, the balanced threshold, and whether a false-alarm budget is kept."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fides_plugins.errors import TrainingError
from fides_plugins.statistics.conformal import Calibration
from fides_plugins.training.detector.calibration import balanced_threshold, fit_temperature, require_rows
from fides_plugins.training.detector.detection import train_on
from fides_plugins.training.evaluation.synthetic import synthetic_pair
from fides_plugins.types import softmax

SPLITS = 4000


@pytest.mark.parametrize("temperature", [0.5, 1.0, 5.0])
def test_the_temperature_that_made_overconfident_rows_is_found(temperature: float):
    rng = np.random.default_rng(0)
    honest = 2.0 * rng.standard_normal((20_000, 6))
    labels = (softmax(honest).cumsum(axis=1) < rng.random((20_000, 1))).sum(axis=1).clip(0, 5)
    found = fit_temperature(softmax(honest * temperature), labels)
    assert found == pytest.approx(temperature, rel=0.05)


def test_the_balanced_threshold_parts_two_groups_and_weighs_attacks_alike():
    rng = np.random.default_rng(0)
    benign, attacked = rng.normal(0, 1, 4000), rng.normal(2, 1, 4000)
    # For equal normal groups the best threshold is midway.
    assert balanced_threshold(benign, {"a": attacked}) == pytest.approx(1.0, abs=0.2)
    few = {"a": attacked, "b": rng.normal(4, 1, 40)}
    many = {"a": attacked, "b": rng.normal(4, 1, 4000)}
    assert balanced_threshold(benign, few) == pytest.approx(balanced_threshold(benign, many), abs=0.3)


def beta_binomial_interval(n: int, allowed: int, n_calibration: int) -> tuple[int, int]:
    """95% interval of the number of false alarms among n rows when `allowed` of n_calibration + 1 ranks alarm.

    Over random calibration sets the count is beta-binomial with a = allowed, b = n_calibration + 1 - allowed
    (Vovk 2012): the budget's own interval, which knows that the calibration is a sample too.
    """
    a, b = allowed, n_calibration + 1 - allowed
    log_choose = [math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) for i in range(n + 1)]
    log_beta = [math.lgamma(i + a) + math.lgamma(n - i + b) - math.lgamma(n + a + b) for i in range(n + 1)]
    scale = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    cumulative = np.cumsum(np.exp(np.array(log_choose) + np.array(log_beta) + scale))
    return int(np.searchsorted(cumulative, 0.025)), int(np.searchsorted(cumulative, 0.975))


@pytest.mark.parametrize("budget", [0.01, 0.02, 0.05])
def test_the_realised_false_alarm_rate_is_inside_the_budgets_interval(budget: float, stored_scores: np.ndarray):
    """On stored scores of benign rows: in at least 95 of 100 random splits, counted over 4,000 of them."""
    inside, rates = 0, []
    cut, n = 3 * len(stored_scores) // 4, len(stored_scores) // 4
    low, high = beta_binomial_interval(n, math.floor(budget * (cut + 1) + 1e-9), cut)
    for seed in range(SPLITS):
        order = np.random.default_rng(seed).permutation(len(stored_scores))
        calibration = Calibration(stored_scores[order[:cut]])
        alarms = int((calibration.p_value(stored_scores[order[cut:]]) <= budget).sum())
        inside += low <= alarms <= high
        rates.append(alarms / n)
    assert inside >= 0.95 * SPLITS
    # The bound itself: on average no more than the budget, up to the error of the mean over splits.
    assert np.mean(rates) <= budget + 3 * np.std(rates) / math.sqrt(SPLITS)


@pytest.fixture(scope="module")
def stored_scores() -> np.ndarray:
    """Scores of a trained detector on 2,000 benign rows that it never saw."""
    from fides_plugins.onnx_model import OnnxModel
    from fides_plugins.training.attacks import default_registry
    from fides_plugins.training.detector.adversarial import GanOptions, train_gan
    from fides_plugins.training.detector.calibration import benign_scores
    from fides_plugins.training.detector.networks import DetectorGraph, export

    registry = default_registry()
    options = GanOptions(rounds=1, steps=40, generator=False)
    networks = train_gan(synthetic_pair(600, 5, signal=3.0), [registry.output("switch")], options=options)
    graph = export(DetectorGraph(networks.scaling, networks.detector, 0.0), ("service", "verification"), ("score",))
    return benign_scores(OnnxModel(graph), synthetic_pair(2000, 5, signal=3.0, seed=1))["learned"]


def test_scores_are_free_of_ties_where_a_threshold_may_lie(stored_scores: np.ndarray):
    top = np.sort(stored_scores)[-200:]
    assert len(np.unique(top)) > 195


def test_too_few_rows_say_how_many_are_needed():
    rows = synthetic_pair(300, 4)
    with pytest.raises(TrainingError, match=r"needs at least 999 calibration rows; this split leaves 60.*4995 rows"):
        train_on(rows, false_alarm_rate=0.001)
    require_rows(99, 0.2, 0.01)
    with pytest.raises(TrainingError, match="at least 99 calibration rows"):
        require_rows(98, 0.2, 0.01)
    rows = synthetic_pair(60, 4)
    with pytest.raises(TrainingError, match="48 rows are left for training; at least 64"):
        train_on(rows, false_alarm_rate=0.1)
