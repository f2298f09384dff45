"""The contract of hosts catches hosts that break it; the hosts of this package are held to it in tests/integration."""

from __future__ import annotations

import numpy as np
import pytest

from fides_plugins.protection import Protection
from fides_plugins.testing import INPUT_NAME, Answered, HostCase, check_host, host_cases, host_requests
from fides_plugins.types import Float32Array, Query, softmax
from tests.support.clients import JudgingClient

CASES = list(host_cases())


class InProcess:
    """The smallest host."""

    def __init__(self, case: HostCase) -> None:
        self.case = case
        self.protection = Protection.load(case.settings, bundle=case.bundle())

    def ask(self, rows: Float32Array) -> Answered:
        query = self.protection.query({INPUT_NAME: rows}, len(rows))
        outcome = self.protection.begin(query)
        output = self.case.service(rows)
        verdict = self.protection.judge(query, output, outcome())
        output, verdict = self.protection.correct(output, verdict)
        return Answered(tuple(verdict.status_text.tolist()), None if verdict.refused.any() else output)


class OnTheClient:
    """What a client does with an answer and the reference that a receipt brought."""

    def __init__(self, case: HostCase) -> None:
        self.case = case
        self.client = JudgingClient(case.bundle(), case.settings)
        self.protection = self.client.protection

    def ask(self, rows: Float32Array) -> Answered:
        answer = self.client.judge(Query({INPUT_NAME: rows}), self.case.service(rows), softmax(rows))
        output, verdict = self.protection.correct(answer.output, answer.verdict)
        return Answered(tuple(verdict.status_text.tolist()), None if verdict.refused.any() else output)


@pytest.mark.parametrize("host", [InProcess, OnTheClient])
@pytest.mark.parametrize("one_row", [False, True])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_host_in_this_process_keeps_the_contract(case: HostCase, one_row: bool, host: type[InProcess]) -> None:
    running = host(case)
    check_host(case, running.ask, one_row)
    running.protection.close()


def test_the_cases_differ_in_what_they_show() -> None:
    """Guards the contract itself: it would hold little if every answer were trusted."""
    assert len({case.name for case in CASES}) == len(CASES)
    host = InProcess(next(c for c in CASES if c.settings.mode == "reject" and not c.settings.plugins.load))
    answers = [host.ask(rows) for rows in host_requests(one_row=True)]
    assert [a.output is None for a in answers] == [i in (1, 4) for i in range(8)]
    assert {s for a in answers for s in a.status} == {"trusted", "attacked", "error"}


@pytest.mark.parametrize(
    "lie",
    [
        lambda a: Answered(("trusted",) * len(a.status), a.output),
        lambda a: Answered(a.status, None),
        lambda a: Answered(a.status, np.roll(a.output, 1)),
    ],
    ids=["status", "refused", "output"],
)
def test_a_host_that_differs_is_named(lie) -> None:
    case = next(c for c in CASES if c.settings.mode == "correct")
    host = InProcess(case)
    with pytest.raises(AssertionError, match="request 0 of 8 row"):
        check_host(case, lambda rows: lie(host.ask(rows)))
