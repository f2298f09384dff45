"""What was asked: tensors by name, of equal rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fides_plugins import InputError, Query
from fides_plugins.types.query import MAX_ID, printable_id


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


@pytest.mark.parametrize("given", ["r1", "5f0c-9#0", "", " a b~", r"C:\new", "x" * MAX_ID])
def test_a_plain_id_stays_as_it_is(given: str):
    assert printable_id(given) == given
    assert Query({"a": np.zeros((1, 1))}, (given,)).request_ids == (given,)


@pytest.mark.parametrize(
    "given",
    [
        "a\nERROR forged",
        "a\r\n",
        "\x1b[2J",
        "\x00",
        "é",
        "\u202e",
        "\u2028",
        "\ud800",
        "\n" * 10**6,
        "x" * 10**6,
        7,
        None,
    ],
)
def test_ids_are_short_printable_ascii(given: Any):
    shown = printable_id(given)
    assert shown.isascii()
    assert shown.isprintable()
    assert 0 < len(shown) <= MAX_ID
    assert printable_id(shown) == shown
    assert Query({"a": np.zeros((1, 1))}, (given,)).request_ids == (shown,)


def test_rows_of_a_long_id_are_told_apart():
    ids = [printable_id("x" * 10**6 + f"#{i}") for i in range(100)]
    assert len(set(ids)) == 100
    assert printable_id("a\nb") != printable_id("a\rb")
