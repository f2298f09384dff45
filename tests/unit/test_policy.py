from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from fides_plugins import Detection, Prediction, Status, Verification
from fides_plugins.guard import Failure
from fides_plugins.policy import combine_detections, decide, refused_rows
from fides_plugins.settings import Settings

RATE = 0.01
RULES = ("bonferroni", "any", "all", "majority")


def calibrated(p: list[float], source: str = "a") -> Detection:
    return Detection(1 - np.array(p), np.array(p) <= RATE, source, p_value=p)


def combine(*arguments: Any) -> Detection:
    return combine_detections(*arguments)[0]


@pytest.mark.parametrize("rule", RULES)
def test_order_of_detectors_does_not_matter(rule: str):
    rng = np.random.default_rng(0)
    detections = [calibrated(rng.random(50).tolist(), str(i)) for i in range(3)]
    detections.append(Detection(rng.random(50), rng.random(50) > 0.8, "plain"))
    first, *others = [combine(list(o), 50, rule, RATE) for o in itertools.permutations(detections)]
    for other in others:
        np.testing.assert_array_equal(first.attacked, other.attacked)
        np.testing.assert_array_equal(first.score, other.score)
        np.testing.assert_array_equal(first.p_value, other.p_value)


def test_bonferroni_pays_for_several_detectors():
    p = calibrated([0.008])
    assert combine([p], 1, "bonferroni", RATE).attacked.tolist() == [True]
    both = combine([p, calibrated([0.9])], 1, "bonferroni", RATE)
    assert both.attacked.tolist() == [False]
    assert both.p_value[0] == pytest.approx(0.016)


def test_bonferroni_keeps_the_budget_with_dependent_detectors():
    rng = np.random.default_rng(1)
    p = rng.random(20000)
    same = [Detection(1 - p, p <= 0.05, str(i), p_value=p) for i in range(4)]
    assert combine(same, len(p), "bonferroni", 0.05).attacked.mean() <= 0.05


@pytest.mark.parametrize(
    ("rule", "attacked"),
    [
        ("any", [True, True, True, False]),
        ("majority", [True, True, False, False]),
        ("all", [True, False, False, False]),
    ],
)
def test_rules_count_votes(rule: str, attacked: list[bool]):
    votes = [[True, True, True, False], [True, True, False, False], [True, False, False, False]]
    detections = [Detection(np.array(vote, float), vote, str(i)) for i, vote in enumerate(votes)]
    assert combine(detections, 4, rule, RATE).attacked.tolist() == attacked


@pytest.mark.parametrize("rule", RULES)
def test_rows_without_an_opinion_do_not_vote(rule: str):
    silent = Detection([0.9], [True], "silent", valid=[False])
    combined = combine([silent, calibrated([0.5])], 1, rule, RATE)
    assert combined.attacked.tolist() == [False]
    assert combined.p_value[0] == pytest.approx(0.5)
    assert not combine([silent], 1, rule, RATE).valid.any()
    assert not combine([], 1, rule, RATE).attacked.any()


def sound(n: int = 1) -> tuple[Prediction, Verification]:
    rows = np.tile([0.9, 0.1], (n, 1))
    return Prediction.from_output(rows, "probabilities"), Verification.single(rows, "v")


SERVICE, VERIFICATION = sound()
NO_ROW = Verification.single([[0.5, 0.5]], "v", available=[False])
BENIGN, ALARM = calibrated([0.5]), calibrated([0.001])
FAILURE = Failure("p", "fides_detect", "raised", "ValueError")


@pytest.mark.parametrize(
    ("verification", "detections", "failures", "status"),
    [
        pytest.param(VERIFICATION, [BENIGN], [], Status.TRUSTED, id="all is there and well"),
        pytest.param(VERIFICATION, [ALARM], [], Status.ATTACKED, id="alarm"),
        pytest.param(VERIFICATION, [ALARM], [FAILURE], Status.ATTACKED, id="alarm and a failure"),
        pytest.param(VERIFICATION, [BENIGN], [FAILURE], Status.ERROR, id="no alarm and a failure"),
        pytest.param(None, [], [FAILURE], Status.ERROR, id="nothing but a failure"),
        pytest.param(None, [], [], Status.INDETERMINATE, id="no verification"),
        pytest.param(VERIFICATION, [], [], Status.INDETERMINATE, id="no detector"),
        pytest.param(NO_ROW, [], [], Status.INDETERMINATE, id="no reference for the row"),
    ],
)
def test_nothing_is_trusted_by_default(
    verification: Verification | None, detections: list[Detection], failures: list[Failure], status: Status
):
    decision = decide(Settings(), SERVICE, verification, detections, failures)
    assert decision.status.tolist() == [status]
    assert (decision.reasons[decision.reason_codes[0]] == "") == (status is Status.TRUSTED)


def test_an_answer_that_is_not_finite_is_an_error_whatever_detectors_say():
    bad = Prediction.from_output([[np.nan, 1]], "logits")
    assert decide(Settings(), bad, VERIFICATION, [ALARM], []).status.tolist() == [Status.ERROR]


def reasons(rule: str, detections: list[Detection], failures: list[Failure]) -> list[str]:
    n = detections[0].n_rows
    settings = Settings.from_mapping({"combine": rule})
    decision = decide(settings, *sound(n), detections, failures)
    return [
        decision.reasons[code].removeprefix("suspicious at a false-alarm rate of ") for code in decision.reason_codes
    ]


def test_a_reason_names_the_detectors_that_raised_the_alarm_of_its_row():
    # Rows: only a within its share, a and c, b without p-values, nobody, b alone with a and c out of opinions.
    a = calibrated([0.001, 0.004, 0.9, 0.9, 0.001], "a")
    c = calibrated([0.008, 0.005, 1.0, 1.0, 1.0], "c")
    a = Detection(a.score, a.attacked, "a", p_value=a.p_value, valid=[True] * 4 + [False])
    b = Detection([0.0, 0.0, 1.0, 0.0, 1.0], [False, False, True, False, True], "b")
    for order in itertools.permutations([a, b, c]):
        assert reasons("bonferroni", list(order), []) == ["0.01 (a)", "0.01 (a, c)", "0.01 (b)", "", "0.01 (b)"]
        # Here the whole budget is each one's own, so c's 0.008 counts in the first row.
        assert reasons("any", list(order), []) == ["0.01 (a, c)", "0.01 (a, c)", "0.01 (b)", "", "0.01 (b)"]
        assert reasons("majority", list(order), []) == ["0.01 (a, c)", "0.01 (a, c)", "", "", ""]
    assert reasons("all", [a, c], []) == ["0.01 (a, c)", "0.01 (a, c)", "", "", ""]


@pytest.mark.parametrize("rule", RULES)
def test_every_alarm_has_a_name_and_equal_reasons_are_one_text(rule: str):
    rng = np.random.default_rng(2)
    n = 500
    # More detectors than a byte has bits; the last has no p-values.
    p_values = [*(rng.random((9, n)) ** 6), np.full(n, np.nan)]
    detections = [
        Detection(rng.random(n), rng.random(n) > 0.5, str(i), p_value=p, valid=rng.random(n) > 0.5)
        for i, p in enumerate(p_values)
    ]
    decision = decide(Settings.from_mapping({"combine": rule}), *sound(n), detections, [])
    raised = combine_detections(detections, n, rule, RATE)[1]  # type: ignore[arg-type]
    codes = decision.reason_codes[decision.attacked]
    names = [", ".join(map(str, np.flatnonzero(column))) for column in raised.T[decision.attacked]]
    assert [decision.reasons[code].split(" (")[1][:-1] for code in codes] == names
    assert "" not in names
    assert len(set(decision.reasons)) == len(decision.reasons)
    assert rule == "all" or len(set(names)) > 20


def test_a_failure_of_some_rows_counts_in_those_alone():
    first = Failure("p", "fides_detect", "contract", "it broke", rows=np.array([True, False, True, True]))
    second = Failure("q", "fides_detect", "contract", "it broke", rows=np.array([False, False, True, False]))
    benign = calibrated([0.5, 0.5, 0.5, 0.001])
    decision = decide(Settings(), *sound(4), [benign], [first, second])
    assert [Status(s).text for s in decision.status] == ["error", "trusted", "error", "attacked"]
    texts = [decision.reasons[code] for code in decision.reason_codes]
    assert texts[:3] == [first.text, "", f"{first.text}; {second.text}"]
    assert texts[3].endswith(f"(a); {first.text}")


@pytest.mark.parametrize(
    ("mode", "on_error", "rows"),
    [
        ("observe", "open", []),
        ("observe", "closed", []),
        ("flag", "open", []),
        ("flag", "closed", [2, 3]),
        ("correct", "open", []),
        ("correct", "closed", [2, 3, 4]),
        ("reject", "open", [1, 4]),
        ("reject", "closed", [1, 2, 3, 4]),
    ],
)
def test_what_is_refused(mode: str, on_error: str, rows: list[int]):
    status = np.array([*Status, Status.ATTACKED])
    corrected = np.array([False, True, False, False, False])
    refused = refused_rows(Settings.from_mapping({"mode": mode, "on_error": on_error}), status, corrected)
    assert np.flatnonzero(refused).tolist() == rows
