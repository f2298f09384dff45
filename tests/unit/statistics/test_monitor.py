"""The monitor: never more false alarms than promised, an alarm soon, and what an attacker cannot teach it."""

from __future__ import annotations

import numpy as np
import pytest

from fides_plugins.errors import InputError
from fides_plugins.statistics.conformal import Calibration
from fides_plugins.statistics.monitor import EProcess, SequenceMonitor

N = 999


def clean_p_values(rng: np.random.Generator, n_calibration: int, streams: int, length: int) -> np.ndarray:
    """(length, streams) conformal p-values, each stream against one calibration set of its own."""
    p = np.empty((length, streams))
    for s in range(streams):
        p[:, s] = Calibration(rng.normal(size=n_calibration)).p_value(rng.normal(size=length))
    return p


def highest(p: np.ndarray, n_calibration: int) -> np.ndarray:
    process = EProcess(n_calibration, p.shape[1])
    top = np.ones(p.shape[1])
    for row in p:
        top = np.maximum(top, process.step(row))
    return top


def test_clean_sequences_raise_no_more_alarms_than_the_error_allows():
    """Ville's inequality at three levels at once; few calibration rows, so that their own error is large."""
    top = highest(clean_p_values(np.random.default_rng(0), 200, streams=500, length=3000), 200)
    for error in (0.1, 0.01, 0.001):
        alarms = int((top >= 1 / error).sum())
        # Three standard deviations above what the error allows.
        assert alarms <= 500 * error + 3 * np.sqrt(500 * error)


def test_a_fixed_calibration_set_would_break_the_promise():
    """The trap: the same bets on p-values against one fixed small set alarm far too often."""
    p = clean_p_values(np.random.default_rng(0), 200, streams=500, length=3000)
    k = np.linspace(0.5, 0.95, 10)
    # log of prod_t k p^(k-1), for each k; the mean over k is the classical mixture of power bets.
    log_wealth = np.cumsum(np.log(k) + (k - 1) * np.log(p)[:, :, None], axis=0)
    fixed = (np.exp(log_wealth.max(axis=2)).max(axis=0) / len(k) >= 1000).mean()
    ours = (highest(p, 200) >= 1000).mean()
    assert fixed > 10 * 0.001
    assert ours <= 0.001 + 3 * np.sqrt(0.001 / 500)


def test_one_step_is_a_fair_bet_whatever_came_before():
    """The expected wealth after the next row, over the cells it may fall into, is the wealth of now."""
    rng = np.random.default_rng(1)
    n = 40
    process = EProcess(n, 1)
    for p in np.concatenate([rng.integers(1, n + 2, 30) / (n + 1), np.full(10, 1 / (n + 1))]):
        process.step(np.array([p]))
    urn, betting, aside, time = process.learned(), process._betting.copy(), process._put_aside, process.time
    now, expected = process.e_values[0], 0.0
    for cell in range(n + 1):
        process.unlearn(urn)
        process._betting, process._put_aside, process.time = betting.copy(), aside, time
        after = process.step(np.array([(cell + 1) / (n + 1)]))[0]
        group = np.searchsorted(process._edges, cell, side="right") - 1
        cells_in_group = np.diff(process._edges)[group]
        expected += after * urn[0, group] / cells_in_group / urn.sum()
    assert expected == pytest.approx(now, rel=1e-9)


def test_an_attack_alarms_within_few_requests_and_names_the_request():
    monitor = SequenceMonitor(N)
    rng = np.random.default_rng(0)
    quiet = Calibration(rng.normal(size=N)).p_value(rng.normal(size=400))
    assert monitor.update(quiet, [f"q{i}" for i in range(400)]) is None
    attack = np.full(40, 2 / (N + 1))
    alarm = monitor.update(attack, [f"a{i}" for i in range(40)])
    assert alarm is not None
    assert alarm is monitor.alarm
    assert alarm.request_id == f"a{alarm.index - 400}"
    assert alarm.index - 400 < 15
    assert alarm.e_value >= 1e6
    assert alarm.rows_since_reset == alarm.index + 1
    assert monitor.seen == 440


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_how_long_a_switch_attack_goes_unseen(fraction: float):
    """P-values as a switch of two models that agree in 87% of rows gives them: 65% of lies below 0.01."""
    rng = np.random.default_rng(2)
    delays = []
    for _ in range(40):
        p = Calibration(rng.normal(size=N)).p_value(rng.normal(size=300))
        small = 10.0 ** rng.uniform(-3, -2, 300)
        lies = np.where(rng.random(300) < 0.65, small, rng.uniform(0.01, 0.3, 300))
        alarm = SequenceMonitor(N).update(np.where(rng.random(300) < fraction, lies, p))
        delays.append(np.inf if alarm is None else alarm.index + 1)
    assert np.median(delays) <= {1.0: 10, 0.5: 40}[fraction]


def test_float32_p_values_fall_into_the_same_cells():
    p = np.arange(1, N + 2) / (N + 1)
    process = EProcess(N)
    np.testing.assert_array_equal(process._cell(p), process._cell(p.astype(np.float32).astype(np.float64)))
    assert process._cell(np.array([1 / (N + 1)]))[0] == 0


def test_batches_and_single_rows_give_the_same_evidence():
    p = np.random.default_rng(3).integers(1, N + 2, 200) / (N + 1)
    one, many = SequenceMonitor(N), SequenceMonitor(N)
    one.update(p)
    for value in p:
        many.update([value])
    assert one.e_value == many.e_value


def test_a_reset_starts_anew_and_forgets_what_the_attacker_taught():
    rng = np.random.default_rng(4)
    quiet = Calibration(rng.normal(size=N)).p_value(rng.normal(size=600))
    attack = np.full(30, 1 / (N + 1))
    monitor = SequenceMonitor(N)
    monitor.update(quiet)
    first = monitor.update(attack)
    assert first is not None
    frozen = monitor.e_value
    assert monitor.update(attack) is None
    assert monitor.e_value == frozen
    monitor.reset()
    assert monitor.alarm is None
    assert monitor.e_value == 1.0
    again = monitor.update(attack)
    assert again is not None
    # Were the first attack's rows still in the urn, the second would look less surprising and last longer.
    assert again.rows_since_reset <= first.rows_since_reset - 600
    assert again.index == 600 + 60 + again.rows_since_reset - 1


def test_clean_rows_are_learned_for_good():
    """Benign traffic whose scores run higher than the calibration's is taken as benign in the end."""
    rng = np.random.default_rng(5)
    monitor = SequenceMonitor(50, error=1e-6)
    monitor.update(rng.integers(1, 52, 5000) / 51)
    before = monitor._process.learned().sum()
    monitor.reset()
    assert monitor._process.learned().sum() > 0.9 * before


def test_rows_without_an_opinion_are_skipped_and_counted():
    monitor = SequenceMonitor(N)
    assert monitor.update([np.nan, 0.5, np.nan]) is None
    assert (monitor.seen, monitor.skipped) == (3, 2)
    alone = SequenceMonitor(N)
    alone.update([0.5])
    assert monitor.e_value == alone.e_value


def test_a_p_value_of_zero_counts_as_the_smallest_conformal_one():
    zero, smallest = SequenceMonitor(N), SequenceMonitor(N)
    for monitor, low in ((zero, 0.0), (smallest, 1 / (N + 1))):
        monitor.update([0.4, low, 0.7, low])
    assert zero.e_value == smallest.e_value > 1.0
    alarm = zero.update(np.zeros(40))
    assert alarm is not None
    assert alarm.index < 20


def test_merged_evidence_of_clean_workers_stays_valid():
    p = clean_p_values(np.random.default_rng(6), 300, streams=400, length=500)
    process = EProcess(300, 400)
    top = np.zeros(100)
    for row in p:
        merged = process.step(row).reshape(100, 4).mean(axis=1)
        top = np.maximum(top, merged)
    assert (top >= 20).mean() <= 0.05 + 3 * np.sqrt(0.05 / 100)


def test_wrong_use_is_refused():
    with pytest.raises(InputError, match=r"outside \[0, 1\]"):
        SequenceMonitor(N).update([-0.1])
    with pytest.raises(InputError, match=r"outside \[0, 1\]"):
        SequenceMonitor(N).update([1.5])
    with pytest.raises(InputError, match="at least one calibration row"):
        SequenceMonitor(0)
    with pytest.raises(InputError, match="between 0 and 1"):
        SequenceMonitor(N, error=0.0)


@pytest.mark.parametrize("n", [1, 2, 127, 128, 129, 5000])
def test_any_number_of_calibration_rows(n: int):
    monitor = SequenceMonitor(n)
    monitor.update(np.linspace(1.0, 1 / (n + 1), 50))
    assert np.isfinite(monitor.e_value)
    assert monitor.alarm is None
    assert monitor._process.learned().sum() == pytest.approx(n + 1 + 50)
