from __future__ import annotations

import itertools

import numpy as np
import pytest

from fides_plugins import Detection, Prediction, Status, Verification
from fides_plugins.guard import Failure
from fides_plugins.policy import combine_detections, decide, refused_rows
from fides_plugins.settings import Settings

RATE = 0.01


def calibrated(p: list[float], source: str = "a") -> Detection:
    return Detection(1 - np.array(p), np.array(p) <= RATE, source, p_value=p)


def test_order_of_detectors_does_not_matter():
    rng = np.random.default_rng(0)
    detections = [calibrated(rng.random(50).tolist(), str(i)) for i in range(3)]
    detections.append(Detection(rng.random(50), rng.random(50) > 0.8, "plain"))
    for rule in ("bonferroni", "any", "all", "majority"):
        results = [combine_detections(list(o), 50, rule, RATE) for o in itertools.permutations(detections)]
        for other in results[1:]:
            np.testing.assert_array_equal(results[0].attacked, other.attacked)
            np.testing.assert_array_equal(results[0].score, other.score)
            np.testing.assert_array_equal(results[0].p_value, other.p_value)


def test_bonferroni_pays_for_several_detectors():
    p = calibrated([0.008])
    assert combine_detections([p], 1, "bonferroni", RATE).attacked.tolist() == [True]
    both = combine_detections([p, calibrated([0.9])], 1, "bonferroni", RATE)
    assert both.attacked.tolist() == [False]
    assert both.p_value[0] == pytest.approx(0.016)


def test_bonferroni_keeps_the_budget_with_dependent_detectors():
    rng = np.random.default_rng(1)
    p = rng.random(20000)
    same = [Detection(1 - p, p <= 0.05, str(i), p_value=p) for i in range(4)]
    assert combine_detections(same, len(p), "bonferroni", 0.05).attacked.mean() <= 0.05


def test_rules_count_votes():
    votes = [
        Detection([1.0, 1.0, 0.0], [True, True, False], "a"),
        Detection([0.0, 1.0, 0.0], [False, True, False], "b"),
    ]
    votes.append(Detection([0.0, 1.0, 0.0], [False, True, False], "c"))
    attacked = {r: combine_detections(votes, 3, r, RATE).attacked.tolist() for r in ("any", "all", "majority")}  # type: ignore[arg-type]
    assert attacked == {"any": [True, True, False], "all": [False, True, False], "majority": [False, True, False]}


def test_rows_without_an_opinion_do_not_vote():
    silent = Detection([0.9], [True], "silent", valid=[False])
    for rule in ("bonferroni", "any", "all", "majority"):
        combined = combine_detections([silent, calibrated([0.5])], 1, rule, RATE)
        assert combined.attacked.tolist() == [False]
        assert combined.p_value[0] == pytest.approx(0.5)
        assert not combine_detections([silent], 1, rule, RATE).valid.any()
        assert not combine_detections([], 1, rule, RATE).attacked.any()


def sound(n: int = 1) -> tuple[Prediction, Verification]:
    rows = np.tile([0.9, 0.1], (n, 1))
    return Prediction.from_output(rows, "probabilities"), Verification.single(rows, "v")


def test_nothing_is_trusted_by_default():
    service, verification = sound()
    failure = Failure("p", "fides_detect", "raised", "ValueError")
    benign, alarm = calibrated([0.5]), calibrated([0.001])
    cases = {
        "trusted": (verification, [benign], []),
        "attacked": (verification, [alarm], []),
        "attacked despite a failure": (verification, [alarm], [failure]),
        "error: a plug-in failed": (verification, [benign], [failure]),
        "error: nothing but a failure": (None, [], [failure]),
        "indeterminate: no verification": (None, [], []),
        "indeterminate: no detector": (verification, [], []),
        "indeterminate: no row": (Verification.single([[0.5, 0.5]], "v", available=[False]), [], []),
    }
    for name, (reference, detections, failures) in cases.items():
        decision = decide(Settings(), service, reference, detections, failures)
        assert Status(decision.status[0]).text == name.split(":")[0].split()[0], name
        assert (decision.reasons[decision.reason_codes[0]] == "") == (name == "trusted"), name
    bad = Prediction.from_output([[np.nan, 1]], "logits")
    decision = decide(Settings(), bad, verification, [alarm], [])
    assert decision.status[0] == Status.ERROR


@pytest.mark.parametrize("mode", ["observe", "flag", "correct", "reject"])
@pytest.mark.parametrize("on_error", ["open", "closed"])
def test_what_is_refused(mode: str, on_error: str):
    status = np.array([*Status, Status.ATTACKED])
    corrected = np.array([False, True, False, False, False])
    refused = refused_rows(Settings.from_mapping({"mode": mode, "on_error": on_error}), status, corrected)
    expected = {
        ("observe", "open"): [],
        ("observe", "closed"): [],
        ("flag", "open"): [],
        ("flag", "closed"): [2, 3],
        ("correct", "open"): [],
        ("correct", "closed"): [2, 3, 4],
        ("reject", "open"): [1, 4],
        ("reject", "closed"): [1, 2, 3, 4],
    }
    assert np.flatnonzero(refused).tolist() == expected[mode, on_error]
