"""Lies of no attack in particular: who wins and where the right class goes are drawn independently."""

from __future__ import annotations

import numpy as np
import pytest

from fides_plugins.training.attacks.misplacements import SECOND, misplace


def answers(n: int, k: int) -> np.ndarray:
    return np.random.default_rng(1).dirichlet(np.full(k, 0.4), size=n).astype(np.float32)


@pytest.mark.parametrize("k", [2, 3, 10, 200])
def test_every_row_names_another_class_and_stays_a_distribution(k: int):
    clean = answers(400, k)
    lies = misplace(clean, np.random.default_rng(0))
    assert lies.dtype == np.float32
    assert (lies.argmax(axis=1) != clean.argmax(axis=1)).all()
    assert (lies >= 0).all()
    np.testing.assert_allclose(lies.sum(axis=1), 1.0, atol=1e-5)


def test_winner_and_place_are_independent_and_all_others_keep_their_order():
    n, k = 20_000, 10
    clean = answers(n, k)
    lies = misplace(clean, np.random.default_rng(0))
    order, after = np.argsort(-clean, axis=1), np.argsort(-lies, axis=1)
    runner_up = after[:, 0] == order[:, 1]
    place = (after == order[:, :1]).argmax(axis=1)
    second = place == 1
    # A draw among all others may give the runner-up, and the second place, too.
    wanted = SECOND + (1 - SECOND) / (k - 1)
    assert abs(runner_up.mean() - wanted) < 0.01
    assert abs(second.mean() - wanted) < 0.01
    assert abs((runner_up & second).mean() - wanted**2) < 0.01
    assert set(place.tolist()) == set(range(1, k))
    moved = (after[:, :, None] == np.stack([after[:, 0], order[:, 0]], axis=1)[:, None, :]).any(axis=2)
    for i in range(200):
        kept = [c for c in order[i] if c not in (after[i, 0], order[i, 0])]
        assert after[i][~moved[i]].tolist() == kept
