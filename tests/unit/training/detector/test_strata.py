"""One order for agreeing and disagreeing rows: shares of the budget, weights of the scores, few rows."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fides_plugins.training.detector.strata import LEARNED_ALONE, SCORE_WEIGHTS, ScoreWeights, Strata

N = 20_000


def benign(disagreeing: float = 0.1) -> tuple[np.ndarray, np.ndarray]:
    """Scores on scales that have nothing to do with each other, and which rows agree."""
    rng = np.random.default_rng(0)
    agrees = rng.random(N) >= disagreeing
    shared = rng.normal(size=N)
    columns = [rng.normal(3, 2, N), rng.normal(-40, 9, N), np.exp(shared + rng.normal(size=N)), np.exp(shared)]
    return np.stack(columns, axis=1), agrees


def ranks(strata: Strata, scores: np.ndarray, agrees: np.ndarray) -> np.ndarray:
    return strata(torch.from_numpy(scores).float(), torch.from_numpy(agrees[:, None])).numpy()


# Alone, a curve is exact at ranks 2, 4, 8, ... and straight in between; a mean of curves is only stretched by a line.
# Three rows either way count for nothing.
@pytest.mark.parametrize(("weights", "off"), [(LEARNED_ALONE, 0.25), (SCORE_WEIGHTS, 0.4)], ids=["alone", "with KL"])
@pytest.mark.parametrize("share", [0.02, 0.1, 0.3])
def test_each_stratum_gets_its_share_of_a_budget(share: float, weights: ScoreWeights, off: float):
    scores, agrees = benign()
    strata = Strata()
    strata.measure(scores, agrees, weights)
    strata.allocate(share)
    for budget in (0.01, 0.05):
        alarms = ranks(strata, scores, agrees) >= -math.log(budget)
        assert (alarms & agrees).mean() == pytest.approx(share * budget, rel=off, abs=3 / N)
        assert (alarms & ~agrees).mean() == pytest.approx((1 - share) * budget, rel=off, abs=3 / N)


def test_a_more_suspicious_row_of_a_stratum_never_ranks_lower():
    scores, agrees = benign()
    strata = Strata()
    strata.measure(scores, agrees)
    line = np.linspace(-200, 200, 5001)
    for which in (False, True):
        found = ranks(strata, np.stack([line] * 4, axis=1), np.full(len(line), which))
        assert np.isfinite(found).all()
        assert (np.diff(found) > 0).all()


@pytest.mark.parametrize(("agrees", "columns"), [(False, (0, 2, 3)), (True, (1, 3))])
def test_a_score_with_a_weight_moves_the_rank_and_no_other_does(agrees: bool, columns: tuple[int, ...]):
    scores, of = benign()
    strata = Strata()
    row = np.median(scores[of == agrees], axis=0, keepdims=True)
    for weights, moving in ((SCORE_WEIGHTS, columns), (LEARNED_ALONE, columns[:1])):
        strata.measure(scores, of, weights)
        start = ranks(strata, row, np.array([agrees]))
        for column in range(4):
            higher = row.copy()
            higher[0, column] += 3.0
            assert (ranks(strata, higher, np.array([agrees])) > start + 1e-3) == (column in moving)


@pytest.mark.parametrize("disagreeing", [0, 1, 2])
def test_almost_no_disagreeing_row_makes_every_disagreement_rare(disagreeing: int):
    scores, _ = benign()
    scores, agrees = scores[:300], np.arange(300) >= disagreeing
    strata = Strata()
    strata.measure(scores, agrees)
    row = ranks(strata, scores[:1], np.array([False]))
    assert row[0] > -math.log(0.05)
    assert np.isfinite(ranks(strata, scores, agrees)).all()


def test_equal_scores_are_no_trouble():
    strata = Strata()
    strata.measure(np.zeros((500, 4)), np.arange(500) % 2 == 0)
    assert np.isfinite(ranks(strata, np.zeros((4, 4)), np.array([True, False, True, False]))).all()
