"""References with few decimals: on their grid, summing to one, and no class overtakes another."""

from __future__ import annotations

import numpy as np
import pytest

from fides_plugins.enclave.rounding import round_rows
from fides_plugins.testing import fake_logits, memory_bundle
from fides_plugins.types import Query, Status, softmax
from tests.support.clients import JudgingClient


@pytest.mark.parametrize("decimals", [1, 2, 3, 6, 9])
@pytest.mark.parametrize("n_classes", [2, 10, 1000])
@pytest.mark.parametrize("margin", [0.0, 2.0, 8.0])
def test_rows_stay_on_the_grid_and_sum_to_one(decimals: int, n_classes: int, margin: float) -> None:
    exact = softmax(fake_logits(200, n_classes, margin=margin))
    rounded = round_rows(exact, decimals)
    counts = np.rint(rounded.astype(np.float64) * 10**decimals)
    assert rounded.dtype == np.float32
    np.testing.assert_allclose(rounded, counts / 10**decimals, rtol=1e-6)
    assert (rounded >= 0).all()
    if decimals < 7:  # beyond, float32 has no such grid
        assert (counts.sum(axis=1) == 10**decimals).all()
    np.testing.assert_allclose(rounded.sum(axis=1, dtype=np.float64), 1, atol=1e-6)
    assert np.abs(rounded - exact).max() <= 1.001 * 10.0**-decimals + 1e-6
    order = np.argsort(exact, axis=1)
    assert (np.diff(np.take_along_axis(rounded, order, axis=1), axis=1) >= 0).all()


def test_what_is_missing_goes_to_the_classes_that_lost_most() -> None:
    rows = np.array([[0.14, 0.18, 0.68], [0.05, 0.05, 0.9], [1, 0, 0], [0, 0, 0], [1 / 3] * 3], np.float32)
    expected = [[0.1, 0.2, 0.7], [0.1, 0, 0.9], [1, 0, 0], [0, 0, 0], [0.4, 0.3, 0.3]]
    np.testing.assert_array_equal(round_rows(rows, 1), np.array(expected, np.float32))


def test_no_rows() -> None:
    assert round_rows(np.zeros((0, 10), np.float32), 2).shape == (0, 10)


@pytest.mark.parametrize(("margin", "decimals", "trusted"), [(2.0, 1, 0), (2.0, 2, 200), (2.0, 3, 200), (8.0, 1, 200)])
def test_soft_answers_need_two_decimals(margin: float, decimals: int, trusted: int) -> None:
    """The figures of the how-to: the service answers as the verifier does, and only the rounding differs."""
    logits = fake_logits(200, margin=margin)
    query = Query({"pixels": logits})
    verdict = JudgingClient(memory_bundle()).judge(query, logits, round_rows(softmax(logits), decimals)).verdict
    assert (verdict.status == Status.TRUSTED).sum() == trusted
