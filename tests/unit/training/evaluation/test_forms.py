"""What coarse answers cost, and by what they are known."""

from __future__ import annotations

import numpy as np
import pytest

from fides_plugins.codec import OutputCodec
from fides_plugins.onnx_model import OnnxModel
from fides_plugins.training.attacks import default_registry
from fides_plugins.training.detector.detection import train_on
from fides_plugins.training.evaluation.forms import AS_ANSWERED, form_costs, rounded, top, ways_to_write
from fides_plugins.training.evaluation.synthetic import synthetic_pair
from fides_plugins.training.predictions import PROBABILITIES

SURE = synthetic_pair(300, 8, service_scale=5.0).service
UNSURE = synthetic_pair(300, 8, service_scale=0.5).service


@pytest.mark.parametrize(
    ("outputs", "form"),
    [
        (SURE, ""),
        (np.round(SURE.astype(np.float64), 6).astype(np.float32), ""),
        (rounded(SURE, 4), "4 decimals"),
        (rounded(SURE, 3), "3 decimals"),
        (top(SURE, 5), "top 5"),
        (rounded(top(UNSURE, 3), 2), "top 3, 2 decimals"),
        (synthetic_pair(300, 2).service, ""),
    ],
)
def test_a_coarse_service_is_known_by_its_outputs(outputs: np.ndarray, form: str) -> None:
    assert PROBABILITIES.coarse_form(outputs) == form
    assert OutputCodec("logits").coarse_form(outputs) == ""


def test_lists_of_top_classes_keep_what_they_keep() -> None:
    kept = top(SURE, 3)
    assert ((kept > 0).sum(axis=1) == 3).all()
    np.testing.assert_array_equal(kept[kept > 0], SURE[kept > 0])
    assert set(ways_to_write(4)) == {AS_ANSWERED, "4 decimals", "3 decimals", "2 decimals", "top 3"}


def test_the_cost_is_what_is_no_longer_caught_and_no_longer_a_distribution() -> None:
    rows = synthetic_pair(900, 8, signal=3.5, service_scale=1.0)
    made = train_on(rows, attacks=("switch", "random"), false_alarm_rate=0.05)
    attacks = [default_registry().output(name) for name in ("switch", "random")]
    new = synthetic_pair(2000, 8, signal=3.5, service_scale=1.0, seed=1)
    costs = {cost.form: cost for cost in form_costs(OnnxModel(made.detector_onnx), new, attacks, 0.05, 0)}
    assert set(costs) == set(ways_to_write(8))
    plain = costs[AS_ANSWERED]
    assert plain.errors == 0
    assert min(plain.caught.values()) > 0.3
    for decimals in (4, 3):
        assert costs[f"{decimals} decimals"].errors < 0.01
        assert costs[f"{decimals} decimals"].caught["random"] == pytest.approx(plain.caught["random"], abs=0.1)
    # Eight classes that are all likely do not fit into three.
    assert costs["top 3"].errors > costs["top 5"].errors > 0.1
