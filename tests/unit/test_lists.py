"""One order for agreeing and disagreeing rows: each list's own false alarms, the share, few rows."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fides_plugins.training.lists import Lists

N = 20_000


def benign(disagreeing: float = 0.1) -> tuple[np.ndarray, np.ndarray]:
    """Logits on scales that have nothing to do with each other, and which rows agree."""
    rng = np.random.default_rng(0)
    agrees = rng.random(N) >= disagreeing
    return np.stack([rng.normal(3, 2, N), rng.normal(-40, 9, N)], axis=1), agrees


def ranks(lists: Lists, logits: np.ndarray, agrees: np.ndarray) -> np.ndarray:
    return lists(torch.from_numpy(logits).float(), torch.from_numpy(agrees[:, None]).float()).numpy()


@pytest.mark.parametrize("share", [0.02, 0.1, 0.3])
def test_each_list_gets_its_share_of_a_budget(share: float):
    logits, agrees = benign()
    lists = Lists()
    lists.measure(logits, agrees)
    lists.give(share)
    for budget in (0.01, 0.05):
        alarms = ranks(lists, logits, agrees) >= -math.log(budget)
        # The curve is exact at ranks 2, 4, 8, ... and straight in between.
        assert (alarms & agrees).mean() == pytest.approx(share * budget, rel=0.25)
        assert (alarms & ~agrees).mean() == pytest.approx((1 - share) * budget, rel=0.25)


def test_a_more_suspicious_row_of_a_list_never_ranks_lower():
    logits, agrees = benign()
    lists = Lists()
    lists.measure(logits, agrees)
    line = np.linspace(-200, 200, 5001)
    for which in (False, True):
        found = ranks(lists, np.stack([line, line], axis=1), np.full(len(line), which))
        assert np.isfinite(found).all()
        assert (np.diff(found) > 0).all()


@pytest.mark.parametrize("disagreeing", [0, 1, 2])
def test_almost_no_disagreeing_row_makes_every_disagreement_rare(disagreeing: int):
    logits, _ = benign()
    logits, agrees = logits[:300], np.arange(300) >= disagreeing
    lists = Lists()
    lists.measure(logits, agrees)
    row = ranks(lists, logits[:1], np.array([False]))
    assert row[0] > -math.log(0.05)
    assert np.isfinite(ranks(lists, logits, agrees)).all()


def test_equal_scores_are_no_trouble():
    lists = Lists()
    lists.measure(np.zeros((500, 2)), np.arange(500) % 2 == 0)
    assert np.isfinite(ranks(lists, np.zeros((4, 2)), np.array([True, False, True, False]))).all()
