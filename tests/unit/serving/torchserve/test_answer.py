"""Which class a final body names."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fides_plugins.serving.torchserve.answer import AnswerReader
from fides_plugins.serving.torchserve.options import AnswerFormat

NAMES = ("cat", "dog", "fox", "owl")
AUTO = AnswerReader(AnswerFormat(), NAMES)


@pytest.mark.parametrize(
    "body",
    [
        1,
        "1",
        "dog",
        " dog\n",
        b"dog",
        '"dog"',
        np.int64(1),
        torch.tensor(1),
        {"dog": 0.7, "cat": 0.2, "owl": 0.1},
        {"0": 0.2, "1": 0.7},
        json.dumps({"cat": 0.2, "dog": 0.7}),
        [["cat", 0.2], ["dog", 0.7]],
        [("dog", 0.7), ("cat", 0.2)],
        [{"label": "fox", "score": 0.1}, {"label": "dog", "score": 0.9}],
        ["dog", "cat"],
        [0.1, 0.7, 0.1, 0.1],
        torch.tensor([0.1, 0.7, 0.1, 0.1]),
        [1],
        {"predictions": [1]},
        {"predictions": [{"dog": 0.7, "cat": 0.2}]},
        {"outputs": [{"name": "a", "datatype": "INT64", "shape": [1], "data": [1]}]},
        {"outputs": [{"name": "a", "datatype": "FP32", "shape": [4], "data": [0.1, 0.7, 0.1, 0.1]}]},
    ],
)
def test_forms_that_are_read_without_being_told(body: Any) -> None:
    assert AUTO.agrees(body, [1]) is True
    assert AUTO.agrees(body, [2]) is False


@pytest.mark.parametrize(
    "body",
    [
        None, True, 4, -1, 1.0, "horse", "", {}, [], {"label": 1}, {"cat": "dog"}, {"cat": True}, {"cat": float("nan")},
        {"horse": 0.9, "dog": 0.1}, [0.3, 0.7], [1, 0, 0, 0],
        [0.1, 0.9, float("nan"), 0.0], b"\x89PNG" + bytes(9000), "[" * 100_000, object(),
        {"outputs": [1]}, {"outputs": []}, {"predictions": {}}, [None],
    ],
)  # fmt: skip
def test_whatever_else_a_body_is_cannot_be_told(body: Any) -> None:
    assert AUTO.agrees(body, [1]) is None


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(), st.lists))
def test_no_body_raises(body: Any) -> None:
    assert AUTO.agrees(body, [0]) in (True, False, None)


def test_scores_that_tie_name_each_of_the_best() -> None:
    for label, expected in ((0, True), (1, True), (2, False)):
        assert AUTO.agrees({"cat": 0.5, "dog": 0.5, "fox": 0.0}, [label]) is expected


def test_a_number_that_is_a_name_may_be_meant_either_way() -> None:
    reader = AnswerReader(AnswerFormat(), ("1", "2", "3"))
    assert [reader.agrees(2, [label]) for label in range(3)] == [False, True, True]


def test_each_row_has_its_answer_or_all_have_one() -> None:
    assert AUTO.agrees(["dog", "cat"], [1, 0]) is True
    assert AUTO.agrees({"predictions": [1, 0, 2]}, [1, 0, 0]) is False
    assert AUTO.agrees({"outputs": [{"data": [1]}, {"data": [3]}]}, [1, 3]) is True
    assert AUTO.agrees({"outputs": [{"data": [1, 3]}]}, [1, 3]) is True
    # Crops of one image, and one answer for all.
    assert AUTO.agrees("dog", [1, 1]) is True
    assert AUTO.agrees("cat", [1, 1]) is False
    assert AUTO.agrees("dog", [1, 0]) is None
    assert AUTO.agrees(["dog"], [1, 1, 0]) is None
    assert AUTO.agrees("dog", []) is None
    assert AUTO.agrees("dog", [-1]) is None


def test_a_path_and_names_say_where_the_class_is_and_what_it_is_called() -> None:
    reader = AnswerReader(AnswerFormat(path="result.animal", names=("Katze", "Hund", "Fuchs", "Eule")), NAMES)
    assert reader.required
    assert reader.agrees({"result": {"animal": "Hund"}}, [1]) is True
    assert reader.agrees({"result": {"animal": "Katze"}}, [1]) is False
    assert reader.agrees({"result": {"animal": "dog"}}, [1]) is None
    assert reader.agrees({"result": [{"animal": "Hund"}, {"animal": "Katze"}]}, [1, 0]) is True
    assert AnswerReader(AnswerFormat(path="0.1"), NAMES).agrees([["id", 3]], [3]) is True
    assert AnswerReader(AnswerFormat(path="0.7.x"), NAMES).agrees([["id", 3]], [3]) is None


def test_nothing_is_compared_where_somebody_said_so() -> None:
    assert AnswerReader(AnswerFormat(compare=False), NAMES).agrees("cat", [1]) is None
    assert AnswerReader(AnswerFormat(), ()).agrees("cat", [1]) is None
