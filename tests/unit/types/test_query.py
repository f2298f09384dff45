"""What was asked: tensors by name, of equal rows."""

from __future__ import annotations

import numpy as np
import pytest

from fides_plugins import InputError, Query


def test_a_query_does_not_lock_the_array_it_was_given():
    mine = np.zeros((2, 3))
    Query({"x": mine})
    mine[0, 0] = 1
    assert mine[0, 0] == 1


def test_the_tensors_of_a_query_have_equal_rows():
    with pytest.raises(InputError, match="disagree"):
        Query({"a": np.zeros((2, 1)), "b": np.zeros((3, 1))})


def test_a_query_has_a_tensor():
    with pytest.raises(InputError, match="no input"):
        Query({})


def test_the_only_tensor_answers_to_any_name():
    with pytest.raises(InputError, match="none is called 'c'"):
        Query({"a": np.zeros((2, 1)), "b": np.zeros((2, 1))}).tensor("c")
    assert Query({"a": np.zeros((2, 1))}).tensor("anything").shape == (2, 1)
