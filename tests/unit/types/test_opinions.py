"""What detectors and re-classifiers say, and which of it counts."""

from __future__ import annotations

import numpy as np
import pytest

from fides_plugins import Detection, InputError, Reclassification


def test_a_score_outside_its_range_is_refused():
    with pytest.raises(InputError, match="outside"):
        Detection([1.5], [True], "d")


def test_a_p_value_outside_its_range_is_refused():
    with pytest.raises(InputError, match="p-value"):
        Detection([0.5], [True], "d", p_value=[-0.1])


def test_a_score_that_is_no_number_is_told_from_an_opinion_withheld():
    d = Detection([np.nan, np.inf, np.nan, 0.5], [True] * 4, "d", valid=[True, True, False, True])
    assert d.valid.tolist() == [False, False, False, True]
    assert d.unscored.tolist() == [True, True, False, False]
    assert np.isnan(d.score).tolist() == [True, True, True, False]


def test_a_correction_that_is_no_distribution_is_marked():
    assert Reclassification([[0.5, 0.5], [np.nan, 1]], "r").label.tolist() == [0, -1]
