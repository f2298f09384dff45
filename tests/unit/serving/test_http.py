"""Headers, bodies and the rule for rows that are not requests."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fides_plugins.serving.http import (
    HEADER_REASON,
    HEADER_STATUS,
    MAX_HEADER_LENGTH,
    RowVerdict,
    as_json,
    envelope,
    headers,
    per_request,
    printable,
    refusal,
)
from fides_plugins.types import Status

anything = st.one_of(st.text(), st.binary(), st.floats(), st.none(), st.lists(st.text()), st.characters())

T = RowVerdict(Status.TRUSTED, 0.1)
A = RowVerdict(Status.ATTACKED, 0.9, refused=True, reason="suspicious")
E = RowVerdict(Status.ERROR, reason="broken")
I = RowVerdict(Status.INDETERMINATE)  # noqa: E741
NOT = RowVerdict(Status.ERROR, reason="not judged")


@given(anything)
def test_header_values_are_printable_ascii(value: object) -> None:
    text = printable(value)
    assert len(text) <= MAX_HEADER_LENGTH
    assert all(" " <= c <= "~" for c in text)


@given(
    st.sampled_from(list(Status)),
    st.floats(),
    st.floats(),
    st.integers(),
    st.text(st.characters()) | st.just("a\r\nset-cookie: x\x00\x85\u2028é"),
)
def test_all_headers_of_any_verdict_can_be_sent(
    status: Status, score: float, p_value: float, label: int, reason: str
) -> None:
    made = headers(RowVerdict(status, score, p_value, label, reason=reason))
    assert made[HEADER_STATUS] == status.text
    for name, value in made.items():
        assert isinstance(value, str)
        assert len(value.encode("ascii")) == len(value) <= MAX_HEADER_LENGTH
        assert value.isprintable() or value == ""
        assert name.startswith("x-fides-")


def test_newlines_become_spaces() -> None:
    assert printable("a\r\nb\tc\x0bd") == "a b c d"
    assert headers(RowVerdict(Status.ERROR, reason="one\ntwo"))[HEADER_REASON] == "one two"


def test_unknown_numbers_have_no_header_and_are_null_in_json() -> None:
    assert headers(RowVerdict(Status.INDETERMINATE)) == {HEADER_STATUS: "indeterminate"}
    shown = as_json(RowVerdict(Status.INDETERMINATE), ("a", "b"))
    assert (shown["score"], shown["p_value"], shown["label"], shown["class_name"]) == (None, None, None, None)
    json.dumps(shown, allow_nan=False)


def test_refusal_says_why_and_gives_no_answer_away() -> None:
    attacked = refusal(RowVerdict(Status.ATTACKED, 0.9, 0.001, 7, 3, 7, refused=True, reason="suspicious"))
    assert (attacked["code"], attacked["fides"]["reason"]) == (409, "suspicious")
    assert not {"label", "class_name"} & attacked["fides"].keys()
    assert refusal(E)["code"] == 503


@pytest.mark.parametrize(
    ("response", "encoding", "value"),
    [({"a": 1}, "json", {"a": 1}), ("text", "text", "text"), (b"\xff\x00", "base64", "/wA="), ([1], "json", [1])],
)
def test_envelope_keeps_the_response(response: object, encoding: str, value: object) -> None:
    wrapped = envelope(response, RowVerdict(Status.TRUSTED, 0.1, 0.5, 1), ("a", "b"))
    assert (wrapped["response_encoding"], wrapped["response"]) == (encoding, value)
    assert wrapped["fides"]["class_name"] == "b"
    json.dumps(wrapped, allow_nan=False)


def test_one_row_per_request_needs_no_rule() -> None:
    for rule in ("refuse", "any", "worst"):
        assert per_request([[T, A, E]], 3, rule, None, lambda why: NOT) == [T, A, E]  # type: ignore[arg-type]


def test_refuse_judges_nobody_when_rows_are_not_requests() -> None:
    assert per_request([[T, T, T]], 2, "refuse", None, lambda why: NOT) == [NOT, NOT]
    assert per_request([[]], 2, "worst", None, lambda why: NOT) == [NOT, NOT]


def test_declared_rows_belong_to_their_request() -> None:
    assert per_request([[T, T, T, A]], 2, "any", 2, lambda why: NOT) == [T, A]
    # Declared, but not true for this batch: nothing is guessed.
    assert per_request([[T, T, T]], 2, "any", 2, lambda why: NOT) == [NOT, NOT]


def test_undeclared_rows_count_for_every_request_of_the_batch() -> None:
    assert per_request([[T, A, T]], 2, "any", None, lambda why: NOT) == [A, A]
    assert per_request([[T]], 3, "worst", None, lambda why: NOT) == [T, T, T]


@pytest.mark.parametrize(
    ("calls", "n", "declared"),
    [
        # Passes over all requests, with one row and with two rows of each.
        ([[T, A, T], [T, A, T]], 3, 2),
        ([[T, T, A, T, T, T], [T, T, T, A, T, T]], 3, 4),
        # Parts: one call per request, uneven calls, and calls that end inside a request.
        ([[T, T], [A, T], [T, T]], 3, 2),
        ([[T, T, T, A], [T, T]], 3, 2),
        ([[T, T, A], [T, T], [T]], 3, 2),
        ([[T], [A, T]], 3, None),
        ([[T, T], [], [A, A], [T, T]], 3, 2),
    ],
)
def test_rows_of_several_calls_find_their_request(calls: list[list[RowVerdict]], n: int, declared: int | None) -> None:
    assert per_request(calls, n, "worst", declared, lambda why: NOT) == [T, A, T]


def test_calls_that_can_be_read_in_two_ways_are_not_guessed() -> None:
    reasons: list[str] = []

    def unjudged(why: str) -> RowVerdict:
        reasons.append(why)
        return NOT

    # Two requests with two rows each: two passes, or one call per request. Four in two calls: likewise.
    for n in (2, 4):
        calls = [[A, *[T] * (n - 1)]] * 2
        assert {v.status for v in per_request(calls, n, "worst", 2, unjudged)} == {Status.ATTACKED}
        assert per_request([[T] * n] * 2, n, "worst", 2, unjudged) == [NOT] * n
        assert per_request(calls, n, "worst", 2, unjudged, "passes") == [A, *[T] * (n - 1)]
    assert per_request([[A, T], [T, T]], 2, "worst", 2, unjudged, "parts") == [A, T]
    # Declared, but not true for this batch.
    assert per_request([[T, T, T], [T]], 2, "worst", 2, unjudged, "passes") == [NOT] * 2
    assert {v.status for v in per_request([[A, T, T], [T]], 2, "worst", 2, unjudged, "passes")} == {Status.ATTACKED}
    assert all("`calls`" in why for why in reasons)
    assert reasons[0] != reasons[-1]
    # One request has all the rows, however they came.
    assert per_request([[T], [A]], 1, "worst", 2, unjudged) == [A]


def test_any_and_worst_differ_in_rows_that_could_not_be_judged() -> None:
    assert per_request([[T, E]], 1, "any", 2, lambda why: NOT) == [T]
    assert per_request([[T, E]], 1, "worst", 2, lambda why: NOT) == [E]
    assert per_request([[T, I]], 1, "worst", 2, lambda why: NOT) == [I]
    assert (
        per_request([[E, A]], 1, "any", 2, lambda why: NOT)
        == per_request([[E, A]], 1, "worst", 2, lambda why: NOT)
        == [A]
    )


@given(st.lists(st.sampled_from([T, A, E, I]), max_size=12), st.integers(1, 5), st.sampled_from([None, 1, 2, 3]))
def test_an_attacked_row_is_never_lost(rows: list[RowVerdict], n: int, declared: int | None) -> None:
    for rule in ("any", "worst"):
        verdicts = per_request([rows], n, rule, declared, lambda why: NOT)  # type: ignore[arg-type]
        assert len(verdicts) == n
        if A in rows:
            assert Status.ATTACKED in {v.status for v in verdicts}
        if not rows:
            assert Status.TRUSTED not in {v.status for v in verdicts}


def test_the_most_suspicious_attack_speaks() -> None:
    mild, strong, unknown = (RowVerdict(Status.ATTACKED, s) for s in (0.6, 0.95, math.nan))
    assert per_request([[mild, unknown, strong]], 1, "any", 3, lambda why: NOT) == [strong]


def test_a_refused_row_outranks_a_corrected_one() -> None:
    """A request may not pass with a row that policy refuses because another of its rows could be corrected."""
    corrected = RowVerdict(Status.ATTACKED, score=1.0, corrected=True)
    unjudged = RowVerdict(Status.ERROR, refused=True)
    for rows in ([corrected, unjudged], [unjudged, corrected]):
        (verdict,) = per_request([rows], 1, "worst", 2, unjudged=lambda why: RowVerdict(Status.ERROR, reason=why))
        assert verdict.refused
        assert verdict.http_status == 503


REFUSED = RowVerdict(Status.ATTACKED, score=1.0, refused=True, reason="suspicious")
TRUSTED = RowVerdict(Status.TRUSTED, score=0.1)


def open_door(why: str) -> RowVerdict:
    """The verdict of an undecided request where `on_error` is open."""
    return RowVerdict(Status.ERROR, reason=why)


@pytest.mark.parametrize(
    ("calls", "n_requests", "declared"),
    [
        # Eight clients, one of whom sent two instances.
        ([[TRUSTED] * 4 + [REFUSED] + [TRUSTED] * 4], 8, None),
        ([[TRUSTED, REFUSED]], 3, 2),
        # Two calls that may be passes over both requests or parts of the batch.
        ([[TRUSTED, REFUSED], [TRUSTED, TRUSTED]], 2, 2),
    ],
)
def test_an_ambiguous_batch_with_an_attacked_row_is_attacked(
    calls: list[list[RowVerdict]], n_requests: int, declared: int | None
) -> None:
    rule = "refuse" if declared is None else "worst"
    verdicts = per_request(calls, n_requests, rule, declared, open_door)
    assert len(verdicts) == n_requests
    assert all(v.refused and v.http_status == 409 for v in verdicts)
    assert all("suspicious" in v.reason for v in verdicts)
    honest = [[TRUSTED for _ in call] for call in calls]
    assert {v.status for v in per_request(honest, n_requests, rule, declared, open_door)} == {Status.ERROR}


def test_an_undecided_request_is_refused_where_errors_are_though_its_rows_were_corrected() -> None:
    corrected = RowVerdict(Status.ATTACKED, score=1.0, corrected=True)
    shut = RowVerdict(Status.ERROR, refused=True)
    for verdict in per_request([[corrected, TRUSTED]], 3, "refuse", None, lambda why: shut):
        assert verdict.refused


@settings(max_examples=400, deadline=None)
@given(
    st.lists(st.lists(st.booleans(), max_size=6), min_size=1, max_size=4),
    st.integers(1, 6),
    st.sampled_from([("worst", None), ("worst", 1), ("worst", 2), ("refuse", None), ("refuse", 1)]),
    st.sampled_from([None, "parts", "passes"]),
)
def test_no_mix_of_rows_hides_an_attacked_one(calls, n_requests, rules, layout):
    """An attacked row makes a request refused; where rows are not one to one, all of them."""
    rule, declared = rules
    rows = [[REFUSED if bad else TRUSTED for bad in call] for call in calls]
    verdicts = per_request(rows, n_requests, rule, declared, open_door, layout)
    flat = [bad for call in calls for bad in call]
    if any(flat):
        assert any(v.refused for v in verdicts)
        if len(flat) != n_requests * (declared or 1):
            assert all(v.refused for v in verdicts)


def test_a_refusal_tells_neither_the_label_nor_that_there_is_one() -> None:
    refused = RowVerdict(Status.ATTACKED, score=0.9, label=3, corrected=True, refused=True, reason="suspicious")
    assert "x-fides-label" not in headers(refused)
    assert not {"label", "class_name", "corrected"} & refusal(refused)["fides"].keys()
    assert headers(RowVerdict(Status.ATTACKED, label=3, corrected=True))["x-fides-label"] == "3"
