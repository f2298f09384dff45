"""Requests without a class output to verify: each exempts itself alone, and hides no attack."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.torchserve_models import CLASS, MIXED, PURE, PURE_PARSER, STREAM
from tests.support.torchserve_worker import Worker, audit, items, logged

#: Does not know explanations: predicts whatever was asked for.
PREDICTS = (
    CLASS
    + """
    def handle(self, data, context):
        return self.postprocess(self.inference(self.preprocess(data)))
"""
)


@pytest.mark.parametrize("source", [MIXED, PREDICTS])
@pytest.mark.parametrize("asking", [0, 2])
def test_an_explanation_exempts_itself_alone(
    work: Callable[..., Worker], tmp_path: Path, source: str, asking: int
) -> None:
    worker = work(source, mode="reject", plugins=audit(tmp_path / "log"))
    lying = (1, 3)
    worker.send(items(4, attacked=lying), explain=(asking,))
    assert [worker.status(i) for i in range(4)] == [409 if i in lying else 200 for i in range(4)]
    assert worker.headers(asking)["x-fides-status"] == "indeterminate"
    assert "explanations" in worker.headers(asking)["x-fides-reason"]
    (honest,) = {0, 2} - {asking}
    assert worker.headers(honest)["x-fides-status"] == "trusted"
    statuses = [s for _, s, _ in logged(worker, tmp_path / "log")]
    assert statuses.count("attacked") == 2
    # Where its row went through inference() with the others, that row is judged and trusted, so not sampled.
    assert statuses.count("indeterminate") == (1 if source == MIXED else 0)


@pytest.mark.parametrize(("on_error", "status"), [("open", 200), ("closed", 503)])
def test_predictions_answered_with_explanations_are_errors(
    work: Callable[..., Worker], on_error: str, status: int
) -> None:
    """TorchServe's own handlers let the first request of a batch decide for all."""
    insights = '        return [{"importance": row[:10].tolist()} for row in self.inference(data)]\n'
    source = CLASS.replace('        return [{"importance": row[:10].tolist()} for row in data]\n', insights)
    worker = work(source, mode="reject", on_error=on_error)
    worker.send(items(3, attacked=(1,)), explain=(0,))
    assert [worker.headers(i)["x-fides-status"] for i in range(3)] == ["indeterminate", "error", "error"]
    assert [worker.status(i) for i in range(3)] == [200, status, status]
    assert "asked for an explanation" in worker.headers(1)["x-fides-reason"]
    worker.send(items(2), explain=(0, 1))
    assert [worker.headers(i)["x-fides-status"] for i in range(2)] == ["indeterminate"] * 2


#: Knows explanations, and gives class outputs to the others.
EXPLAINS = PURE.replace(
    "    return answers(service(rows(decoded(data))))\n",
    "    made = answers(service(rows(decoded(data))))\n"
    "    asked = [context.get_request_header(i, 'explain') == 'True' for i in range(len(data))]\n"
    "    return [{'importance': [1.0]} if yes else answer for yes, answer in zip(asked, made)]\n",
)


def test_an_explanation_exempts_itself_alone_where_bodies_are_read(work: Callable[..., Worker], tmp_path: Path) -> None:
    worker = work(EXPLAINS, mode="correct", plugins=audit(tmp_path / "log"), **PURE_PARSER)
    sent = items(4, attacked=(0, 1, 3))
    answers = worker.send(sent, explain=(0,))
    assert [worker.headers(i)["x-fides-status"] for i in range(4)] == [
        "indeterminate",
        "attacked",
        "trusted",
        "attacked",
    ]
    plain = work(EXPLAINS, mode="flag", **PURE_PARSER).send(sent, explain=(0,))
    assert [a == b for a, b in zip(answers, plain, strict=True)] == [True, False, True, False]
    rows = logged(worker, tmp_path / "log")
    assert sorted(r[:2] for r in rows) == [
        ("request-0", "indeterminate"),
        ("request-1", "attacked"),
        ("request-3", "attacked"),
    ]


@pytest.mark.parametrize("asked", [{"explain": (0, 1, 2)}, {"describe": "True"}])
@pytest.mark.parametrize(("mode", "statuses"), [("correct", [200] * 3), ("reject", [409, 200, 409])])
def test_a_header_hides_no_attack_where_bodies_are_read(
    work: Callable[..., Worker], asked: dict[str, Any], mode: str, statuses: list[int]
) -> None:
    """This handler predicts whatever was asked for."""
    worker = work(PURE, mode=mode, **PURE_PARSER)
    sent = items(3, attacked=(0, 2))
    answers = worker.send(sent, **asked)
    assert [worker.headers(i)["x-fides-status"] for i in range(3)] == ["attacked", "indeterminate", "attacked"]
    assert [worker.status(i) for i in range(3)] == statuses
    plain = work(PURE, mode="flag", **PURE_PARSER).send(sent)
    assert [a == b for a, b in zip(answers, plain, strict=True)] == [False, True, False]


def test_explanations_and_streams_are_counted(work: Callable[..., Worker], tmp_path: Path) -> None:
    stream = STREAM.replace("from ts.handler_utils.utils import send_intermediate_predict_response\n", "").replace(
        'send_intermediate_predict_response([text], context.request_ids, "Intermediate", 200, context)',
        "context.set_response_header(0, 'ts_stream_next', 'true')",
    )
    worker = work(stream, mode="reject", on_error="closed", plugins=audit(tmp_path / "log"))
    assert worker.send(items(1)) == ["three"]
    assert worker.headers()["x-fides-status"] == "indeterminate"
    assert [r[1] for r in logged(worker, tmp_path / "log")] == ["indeterminate"]
    worker = work(mode="reject", on_error="closed", plugins=audit(tmp_path / "explained"))
    worker.send(items(2), explain=(0, 1))
    assert [r[:2] for r in logged(worker, tmp_path / "explained")] == [
        ("request-0", "indeterminate"),
        ("request-1", "indeterminate"),
    ]


@pytest.mark.parametrize("n", [1, 3])
def test_asking_for_an_explanation_hides_no_attack(work: Callable[..., Worker], n: int) -> None:
    """Any client may send the header, and this handler predicts all the same."""
    source = CLASS + (
        "    def handle(self, data, context):\n        return self.postprocess(self.inference(self.preprocess(data)))\n"
    )
    worker = work(source, mode="reject")
    worker.send(items(n, attacked=(0,)), explain=tuple(range(n)))
    assert [worker.status(i) for i in range(n)] == [409] + [200] * (n - 1)
    assert "x-fides-label" not in worker.headers(0)
