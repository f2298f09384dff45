"""How many rows a request may have made, and how a batch is divided."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fides_plugins.serving.http import only_split
from fides_plugins.serving.torchserve.row_counts import row_counts

ROW = [0.0] * 11


@pytest.mark.parametrize(
    ("body", "counts"),
    [
        ({"x": ROW}, {1}),
        ({"instances": [ROW, ROW]}, {1, 2}),
        ({"instances": [{"x": ROW}] * 3}, {1, 3}),
        ({"instances": []}, {0, 1}),
        ({"inputs": [{"name": "a", "shape": [11], "data": ROW}] * 2}, {1, 2, 11, 22}),
        ({"inputs": [{"name": "a", "shape": [4, 11], "data": ROW * 4}]}, {1, 4}),
        ({"x": [ROW, ROW]}, {1, 2}),
        ({"instances": [[], ROW]}, {1, 2}),
        ({"instances": [[ROW, ROW], ROW]}, {1, 2, 3}),
        ([ROW, ROW, ROW], {1, 3}),
        ("no list", {1}),
        (b"\xff\xd8\xff\xe0 an image", {1}),
        (b"[" * 100_000, {1}),
        (None, {1}),
        ({"inputs": [{"shape": "wide"}, {"shape": [-1]}]}, {1, 2}),
    ],
)
def test_a_body_offers_what_it_can_be_read_to_have(body: Any, counts: set[int]) -> None:
    assert row_counts({"body": body}) == counts
    if isinstance(body, (dict, list)):
        assert row_counts({"data": json.dumps(body).encode()}) == counts


def test_an_envelopes_items_may_be_empty_or_hold_several_rows() -> None:
    """Clients around another one could else shift the rows of all three, if a handler joins what items hold."""
    assert row_counts({"body": {"instances": [ROW, ROW], "other": [ROW] * 5}}, 2) == {2}
    assert row_counts({"body": {"instances": [[]]}}, 1) == {0, 1}
    assert row_counts({"body": {"instances": [[ROW, ROW]]}}, 1) == {1, 2}
    shifted = [row_counts({"body": {"instances": [i]}}, 1) for i in ([ROW, ROW], ROW, [])]
    assert only_split(shifted, 3) is None


def test_only_one_way_to_divide_a_batch_counts() -> None:
    assert only_split([{1, 2}, {1}, {1, 3}], 6) == [2, 1, 3]
    assert only_split([{1, 2}, {1}, {1, 3}], 3) == [1, 1, 1]
    assert only_split([{1, 2}, {1, 2}], 3) is None  # either of the two
    assert only_split([{0, 1}, {1, 2}], 2) is None  # one each, or both of the second
    assert only_split([{1}, {1}], 3) is None
    assert only_split([set(range(1, 200))] * 200, 20_000) is None  # a client's bodies cost no minutes


@given(st.lists(st.sets(st.integers(0, 4), min_size=1), max_size=6), st.integers(0, 12))
def test_every_other_way_is_looked_at(counts: list[set[int]], total: int) -> None:
    import itertools

    every = [list(way) for way in itertools.product(*counts) if sum(way) == total]
    assert only_split(counts, total) == (every[0] if len(every) == 1 else None)
