"""Divergences against values worked out by hand and by scipy-free identities."""

from __future__ import annotations

import numpy as np
import pytest

from fides_plugins.errors import SettingsError
from fides_plugins.statistics import divergences as d

P = np.array([[0.5, 0.25, 0.25], [1.0, 0.0, 0.0], [0.2, 0.3, 0.5]])
Q = np.array([[0.25, 0.5, 0.25], [0.0, 0.0, 1.0], [0.2, 0.3, 0.5]])


def test_by_hand():
    # Row 0: 0.5 log 2 + 0.25 log 0.5 = 0.25 log 2, the same in both directions.
    assert d.kl(P, Q)[0] == pytest.approx(0.25 * np.log(2))
    assert d.kl_reverse(P, Q)[0] == pytest.approx(0.25 * np.log(2))
    assert d.jeffreys(P, Q)[0] == pytest.approx(0.5 * np.log(2))
    assert d.js(P, Q)[1] == pytest.approx(np.log(2), abs=1e-5)
    assert d.total_variation(P, Q).tolist() == pytest.approx([0.25, 1.0, 0.0])
    # Row 0 moves a quarter by one class of two; row 1 moves everything by two of two.
    assert d.wasserstein(P, Q).tolist() == pytest.approx([0.125, 1.0, 0.0])
    assert d.cross_entropy(P, P)[2] == pytest.approx(d.entropy(P)[2])


@pytest.mark.parametrize("name", sorted(d.DIVERGENCES))
def test_every_divergence_is_finite_and_scores_lie_in_the_unit_interval(name: str):
    rng = np.random.default_rng(0)
    p, q = rng.dirichlet(np.full(7, 0.05), 500), rng.dirichlet(np.full(7, 0.05), 500)
    values, scores = d.divergence(name)(p, q), d.score(name, p, q)
    assert np.isfinite(values).all()
    assert values.shape == (500,)
    assert ((scores >= 0) & (scores <= 1)).all()
    np.testing.assert_array_equal(np.argsort(values.astype(np.float32), kind="stable")[:5], np.argsort(values)[:5])
    if name != "cross_entropy":
        np.testing.assert_allclose(d.divergence(name)(p, p), 0, atol=1e-9)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(SettingsError, match="Known are: kl, kl_reverse, js"):
        d.divergence("chi")
