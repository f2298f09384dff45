from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fides_plugins import Detection, InputError, Prediction, Query, Reclassification, Verification
from fides_plugins.types import softmax


def test_logits_and_probabilities_give_the_same_prediction():
    logits = np.array([[1.0, 2.0, -3.0], [0.0, 0.0, 9.0]])
    a = Prediction.from_output(logits, "logits")
    b = Prediction.from_output(softmax(logits), "probabilities")
    np.testing.assert_allclose(a.probabilities, b.probabilities, atol=1e-6)
    assert a.label.tolist() == [1, 2]
    assert a.probabilities.dtype == np.float32
    assert a.probabilities.flags.c_contiguous


def test_temperature_flattens_logits():
    logits = np.array([[4.0, 0.0]])
    cold, hot = (Prediction.from_output(logits, "logits", t).probabilities[0, 0] for t in (1.0, 4.0))
    assert hot < cold
    assert hot == pytest.approx(1 / (1 + np.exp(-1)), abs=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_is_marked_and_the_others_stand(bad: float):
    logits = np.array([[1.0, 2.0], [bad, 0.0], [3.0, 1.0]])
    prediction = Prediction.from_output(logits, "logits")
    assert prediction.valid.tolist() == [True, False, True]
    assert prediction.label.tolist() == [1, -1, 0]
    assert np.isfinite(prediction.probabilities).all()


def test_probabilities_that_are_no_distribution_are_marked():
    rows = np.array([[0.5, 0.5], [0.9, 0.9], [1.5, -0.5], [0.504, 0.5]])
    assert Prediction.from_output(rows, "probabilities").valid.tolist() == [True, False, False, True]


@pytest.mark.parametrize("shape", [(3,), (2, 3, 4), (4, 1), ()])
def test_a_wrong_shape_is_refused_by_name(shape: tuple[int, ...]):
    with pytest.raises(InputError, match=r"shape|class"):
        Prediction.from_output(np.zeros(shape), "logits")


def test_text_is_no_class_output():
    with pytest.raises(InputError, match="dtype"):
        Prediction.from_output(np.array([["a", "b"]]), "logits")


def test_everything_is_read_only():
    query = Query({"x": np.zeros((2, 3))})
    prediction = Prediction.from_output(np.zeros((2, 3)), "logits")
    verification = Verification.single(prediction.probabilities, "v")
    detection = Detection(np.zeros(2), np.zeros(2, bool), "d")
    arrays = [query.tensor(), prediction.probabilities, prediction.valid, verification.references, detection.score]
    for array in arrays:
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1


def test_a_query_does_not_lock_the_array_it_was_given():
    mine = np.zeros((2, 3))
    Query({"x": mine})
    mine[0, 0] = 1
    assert mine[0, 0] == 1


def test_a_query_needs_equal_rows_and_a_known_tensor():
    with pytest.raises(InputError, match="disagree"):
        Query({"a": np.zeros((2, 1)), "b": np.zeros((3, 1))})
    with pytest.raises(InputError, match="none is called 'c'"):
        Query({"a": np.zeros((2, 1)), "b": np.zeros((2, 1))}).tensor("c")
    assert Query({"a": np.zeros((2, 1))}).tensor("anything").shape == (2, 1)
    with pytest.raises(InputError, match="no input"):
        Query({})


def test_references_join_and_average_over_those_available():
    a = Verification.single([[1.0, 0.0], [1.0, 0.0]], "a")
    b = Verification.single([[0.0, 1.0], [0.0, 1.0]], "b", available=[True, False])
    both = Verification.join([a, b])
    assert both.sources == ("a", "b")
    np.testing.assert_allclose(both.probabilities, [[0.5, 0.5], [1.0, 0.0]])
    none = Verification.single([[1.0, 0.0]], "a", available=[False])
    assert none.label.tolist() == [-1]
    np.testing.assert_allclose(none.probabilities, [[0.5, 0.5]])


def test_a_reference_that_is_no_distribution_is_not_available():
    v = Verification.single([[0.2, 0.8], [np.nan, 1.0], [3.0, 4.0]], "v")
    assert v.valid.tolist() == [True, False, False]


def test_a_score_or_p_value_outside_its_range_is_refused():
    with pytest.raises(InputError, match="outside"):
        Detection([1.5], [True], "d")
    with pytest.raises(InputError, match="p-value"):
        Detection([0.5], [True], "d", p_value=[-0.1])


def test_a_score_that_is_no_number_is_told_from_an_opinion_withheld():
    d = Detection([np.nan, np.inf, np.nan, 0.5], [True] * 4, "d", valid=[True, True, False, True])
    assert d.valid.tolist() == [False, False, False, True]
    assert d.unscored.tolist() == [True, True, False, False]
    assert np.isnan(d.score).tolist() == [True, True, True, False]


def test_a_correction_that_is_no_distribution_is_marked():
    assert Reclassification([[0.5, 0.5], [np.nan, 1]], "r").label.tolist() == [0, -1]


@given(
    hnp.arrays(
        np.float64,
        hnp.array_shapes(min_dims=2, max_dims=2, min_side=0, max_side=6).filter(lambda s: s[1] >= 2),
        elements=st.floats(allow_nan=True, allow_infinity=True, width=32),
    )
)
def test_any_numbers_become_distributions_or_are_marked(output: np.ndarray):
    for kind in ("logits", "probabilities"):
        prediction = Prediction.from_output(output, kind)  # type: ignore[arg-type]
        assert np.isfinite(prediction.probabilities).all()
        np.testing.assert_allclose(prediction.probabilities.sum(axis=1), 1, atol=1e-4)
        if kind == "logits":
            np.testing.assert_array_equal(prediction.valid, np.isfinite(output).all(axis=1))
