"""Whose rows are whose, however often a handler calls `inference()` and whatever an envelope makes of bodies."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from ts.context import RequestProcessor

from tests.support.torchserve_models import CLASS, INPUTS, INSTANCES, MICRO_BATCHING, PASSES, kserve_v2, rows
from tests.support.torchserve_worker import Worker, items


def test_inference_called_once_per_request(work: Callable[..., Worker]) -> None:
    source = CLASS + (
        "    def handle(self, data, context):\n"
        "        return [self.postprocess(self.inference(self.preprocess([d])))[0] for d in data]\n"
    )
    worker = work(source, mode="reject")
    worker.send(items(5, attacked=(2,)))
    assert [worker.status(i) for i in range(5)] == [200, 200, 409, 200, 200]


def test_inference_called_twice_on_the_batch(work: Callable[..., Worker]) -> None:
    worker = work(PASSES, mode="reject", rows="worst", rows_per_request=2)
    worker.send(items(3, attacked=(1,)))
    assert [worker.status(i) for i in range(3)] == [200, 409, 200]
    # Four rows twice are as well two requests at a time: that is not guessed, and an attack lets nobody through.
    worker.send(items(4))
    assert {worker.headers(i)["x-fides-status"] for i in range(4)} == {"error"}
    assert "set `calls`" in worker.headers(0)["x-fides-reason"]
    worker.send(items(4, attacked=(1,)))
    assert [worker.status(i) for i in range(4)] == [409] * 4
    worker = work(PASSES, mode="reject", rows="worst", rows_per_request=2, calls="passes")
    worker.send(items(4, attacked=(1,)))
    assert [worker.status(i) for i in range(4)] == [200, 409, 200, 200]


def test_micro_batches_are_parts_whatever_their_sizes(work: Callable[..., Worker]) -> None:
    source = MICRO_BATCHING.replace("micro_batch_size=3", "micro_batch_size=2").replace(
        "* self.scale\n", ".repeat_interleave(2, dim=0)\n"
    )
    source = source.replace("answers(logits)", "answers(logits.reshape(-1, 2, 10).mean(dim=1))")
    worker = work(source, mode="reject", rows="worst", rows_per_request=2)
    try:
        # Two calls of four rows for four requests: by their sizes alone they could be passes.
        worker.send(items(4, attacked=(1,)))
    finally:
        # Its threads would keep the tests from ending.
        worker.handler.original.instance.handle.shutdown()
    assert [worker.status(i) for i in range(4)] == [200, 409, 200, 200]


def instances(*groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One request for each group, as clients of the envelope `json` and of KServe v1 write it."""
    return [{"body": {"instances": group}} for group in groups]


def test_a_service_envelope_tells_which_rows_are_whose(work: Callable[..., Worker]) -> None:
    """TorchServe's envelope `json` hands a handler the rows of all requests in one list, and joins the answers."""
    worker = work(mode="reject", service_envelope="json")
    flat = items(9, attacked=(2, 8))
    # Eight clients; the second sends two instances.
    answers = worker.send(instances(flat[:1], flat[1:3], *([item] for item in flat[3:])))
    assert [worker.status(i) for i in range(8)] == [200, 409, 200, 200, 200, 200, 200, 409]
    assert [worker.headers(i)["x-fides-status"] for i in (0, 1)] == ["trusted", "attacked"]
    # A refusal is the whole body: among the predictions it would be one more answer.
    assert answers[1]["type"] == "FidesAttackDetected"
    assert set(json.loads(answers[0])) == {"predictions"}
    # Each batch is divided by its own lengths.
    worker.send(instances(flat[:2], flat[2:3]))
    assert [worker.status(i) for i in range(2)] == [200, 409]


def test_inputs_of_a_kserve_v2_request_are_its_rows(work: Callable[..., Worker]) -> None:
    worker = work(INPUTS, mode="reject", service_envelope="kservev2")
    worker.context.manifest = {"model": {"modelName": "digits", "modelVersion": "1.0"}}

    def request(*attacked: int) -> list[dict[str, Any]]:
        return [{"body": kserve_v2(rows(2, seed=33, attacked=attacked))}]

    (honest,) = worker.send(request())
    assert (worker.status(), worker.headers()["x-fides-status"]) == (200, "trusted")
    assert [o["name"] for o in honest["outputs"]] == ["row-0", "row-1"]
    (refused,) = worker.send(request(1))
    assert (worker.status(), refused["code"]) == (409, 409)
    assert "outputs" not in refused


def test_rows_are_counted_in_bodies_where_no_envelope_counts_them(work: Callable[..., Worker]) -> None:
    worker = work(INSTANCES, mode="reject")
    flat = [item["body"] for item in items(6, attacked=(1, 4))]
    worker.send(instances(flat[:3], flat[3:4], flat[4:]))
    assert [worker.status(i) for i in range(3)] == [409, 200, 409]
    # A request without rows: who has two, or whether each has one, cannot be told. An attack shuts the door for both.
    worker.send(instances([], flat[2:4]))
    assert [worker.headers(i)["x-fides-status"] for i in range(2)] == ["error", "error"]
    worker.send(instances([], flat[1:3]))
    assert [worker.status(i) for i in range(2)] == [409, 409]


@pytest.mark.parametrize("header", ["explain", "describe"])
def test_an_explanation_takes_no_row_of_another_request(work: Callable[..., Worker], header: str) -> None:
    """Two rows of two requests: one of each, or both of the second, if the first was answered otherwise."""
    source = INSTANCES.replace('d["body"]["instances"] for d in data', 'd["body"]["instances"] for d in data[1:]')
    source = source.replace("return [{", "return [[]] + [{")
    worker = work(source, mode="reject")
    flat = [item["body"] for item in items(3, attacked=(1,))]
    worker.context.request_ids = {0: "a", 1: "b"}
    worker.context.request_processor = [
        RequestProcessor({"url_path": "", header: "True"}),
        RequestProcessor({"url_path": ""}),
    ]
    worker.entry(instances(flat[:1], flat[1:]), worker.context)
    assert worker.status(1) == 409
