"""Class distributions from a service and from references: read, marked, joined."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fides_plugins import InputError, Prediction, Verification
from fides_plugins.types import OutputKind, softmax


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


@pytest.mark.parametrize("kind", ["logits", "probabilities"])
@given(
    hnp.arrays(
        np.float64,
        hnp.array_shapes(min_dims=2, max_dims=2, min_side=0, max_side=6).filter(lambda s: s[1] >= 2),
        elements=st.floats(allow_nan=True, allow_infinity=True, width=32),
    )
)
def test_any_numbers_become_distributions_or_are_marked(kind: OutputKind, output: np.ndarray):
    prediction = Prediction.from_output(output, kind)
    assert np.isfinite(prediction.probabilities).all()
    np.testing.assert_allclose(prediction.probabilities.sum(axis=1), 1, atol=1e-4)
    if kind == "logits":
        np.testing.assert_array_equal(prediction.valid, np.isfinite(output).all(axis=1))
