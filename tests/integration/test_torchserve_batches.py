"""Batches, rows that are not requests, misbehaving plug-ins, streams and explanations on a real server."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest

from fides_plugins.launch.torchserve import TorchServeServer
from fides_plugins.launch.torchserve_grpc import GrpcClient
from tests.support.torchserve_models import FAULTY, body, plain_archive, post, protected_archive, rows

pytestmark = pytest.mark.integration

BATCH = 8
CONFIG = f"batchSize: {BATCH}\nmaxBatchDelay: 1500\n"
FAULTS = {
    "files": {"faulty.py": FAULTY},
    "plugins": {"load": ["faulty:plugin"]},
    "timeout_ms": 300,
    "breaker_failures": 100,
}


@pytest.fixture(scope="module")
def server(backdoor_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TorchServeServer]:
    store = tmp_path_factory.mktemp("batches")
    plain_archive(store, name="bare", config=CONFIG)
    protected_archive(store, "reject", backdoor_folder, mode="reject", config=CONFIG)
    protected_archive(store, "open", backdoor_folder, mode="flag", on_error="open", **FAULTS)
    protected_archive(store, "closed", backdoor_folder, mode="flag", on_error="closed", **FAULTS)
    protected_archive(store, "unruled", backdoor_folder, "crops", mode="flag")
    protected_archive(store, "ambiguous", backdoor_folder, "crops", mode="reject", config=CONFIG)
    protected_archive(store, "predicts", backdoor_folder, "functions", mode="reject")
    two = {"rows": "any", "rows_per_request": 2}
    protected_archive(store, "ruled", backdoor_folder, "crops", mode="reject", config=CONFIG, **two)
    protected_archive(store, "mixed", backdoor_folder, "mixed", mode="reject", config=CONFIG.replace("8", "4"))
    worst = {"rows": "worst", "rows_per_request": 2}
    protected_archive(
        store, "passes", backdoor_folder, "passes", mode="reject", config=CONFIG.replace("8", "3"), **worst
    )
    plain_archive(store, "stream", name="barestream")
    protected_archive(store, "stream", backdoor_folder, "stream", mode="reject", on_error="closed")
    models = {p.stem: p.name for p in store.glob("*.mar")}
    with TorchServeServer(store, models) as running:
        yield running


def together(server: TorchServeServer, model: str, x: np.ndarray) -> list[httpx.Response]:
    with ThreadPoolExecutor(len(x)) as pool:
        return list(pool.map(lambda row: post(server, model, row), x))


def test_reject_refuses_three_of_a_batch_of_eight(server: TorchServeServer) -> None:
    x = rows(BATCH, seed=11, attacked=(1, 4, 6))
    bare, judged = together(server, "bare", x), together(server, "reject", x)
    assert {a.json()["batch"] for a in bare} == {BATCH}
    for index, (before, after) in enumerate(zip(bare, judged, strict=True)):
        if index in (1, 4, 6):
            assert after.status_code == 409
            assert after.json()["fides"]["reason"].startswith("suspicious")
            assert after.headers["x-fides-status"] == "attacked"
        else:
            # The bare answer tells its batch, so equal bodies mean that both went in batches of eight.
            assert (after.status_code, after.content) == (200, before.content)
            assert after.headers["x-fides-status"] == "trusted"


def test_grpc_refusal_is_a_json_body_with_the_code(server: TorchServeServer) -> None:
    (attacked,) = rows(1, seed=12, attacked=(0,))
    with GrpcClient(server.grpc_target) as client:
        refused = json.loads(client.predict("reject", {"data": json.dumps(body(attacked)).encode()}))
    assert refused["code"] == 409
    assert refused["type"] == "FidesAttackDetected"
    assert "probabilities" not in refused


@pytest.mark.parametrize(("trigger", "reason"), [(2.0, "raised ValueError"), (3.0, "in time"), (4.0, "contract")])
def test_plugin_faults_are_marked_or_refused_by_policy(server: TorchServeServer, trigger: float, reason: str) -> None:
    good = rows(1, seed=13)[0]
    bad = rows(1, seed=13, attacked=(0,), trigger=trigger)[0]
    for model in ("open", "closed"):
        assert post(server, model, good).headers["x-fides-status"] == "trusted"
        start = time.monotonic()
        answer = post(server, model, bad)
        assert time.monotonic() - start < 2.0
        assert answer.status_code == (200 if model == "open" else 503)
        assert answer.headers["x-fides-status"] == "error"
        assert reason in answer.headers["x-fides-reason"]
        assert "secret" not in answer.text + answer.headers["x-fides-reason"]
        after = post(server, model, good)
        assert (after.status_code, after.headers["x-fides-status"]) == (200, "trusted")


def test_a_newline_in_a_reason_kills_nobody(server: TorchServeServer) -> None:
    before = server.workers("open")
    answer = post(server, "open", rows(1, attacked=(0,), trigger=5.0)[0])
    assert answer.status_code == 200
    assert answer.headers["x-fides-status"] == "attacked"
    assert "x-injected" not in answer.headers
    assert answer.headers["x-fides-reason"].isprintable()
    assert answer.headers["x-fides-reason"].isascii()
    assert server.workers("open") == before


def test_rows_that_are_not_requests_follow_the_rule(server: TorchServeServer) -> None:
    (honest,) = rows(1, seed=14)
    unruled = post(server, "unruled", honest)
    assert unruled.status_code == 200
    assert unruled.headers["x-fides-status"] == "error"
    assert "one to one" in unruled.headers["x-fides-reason"]
    answers = together(server, "ruled", rows(BATCH, seed=15, attacked=(2, 3)))
    assert [a.status_code for a in answers] == [409 if i in (2, 3) else 200 for i in range(BATCH)]


def test_a_batch_whose_rows_cannot_be_told_lets_no_lie_through(server: TorchServeServer) -> None:
    """The door of `on_error: open` is for honest batches: one attacked row shuts it for all requests of its batch."""
    honest = together(server, "ambiguous", rows(BATCH, seed=16))
    assert {(a.status_code, a.headers["x-fides-status"]) for a in honest} == {(200, "error")}
    attacked = together(server, "ambiguous", rows(BATCH, seed=16, attacked=(5,)))
    assert {(a.status_code, a.headers["x-fides-status"]) for a in attacked} == {(409, "attacked")}
    assert all("one to one" in a.headers["x-fides-reason"] for a in attacked)


@pytest.mark.parametrize("header", ["describe", "explain"])
def test_a_clients_header_switches_no_verification_off(server: TorchServeServer, header: str) -> None:
    (attacked,) = rows(1, seed=17, attacked=(0,))
    answer = post(server, "predicts", attacked, **{header: "True"})
    assert answer.status_code == 409
    assert "x-fides-label" not in answer.headers


def test_explanations_pass_marked(server: TorchServeServer) -> None:
    (attacked,) = rows(1, seed=16, attacked=(0,))
    bare, answer = post(server, "bare", attacked, "explanations"), post(server, "reject", attacked, "explanations")
    assert bare.status_code == answer.status_code == 200
    assert bare.content == answer.content
    assert answer.headers["x-fides-status"] == "indeterminate"
    assert "explanations" in answer.headers["x-fides-reason"]


def test_passes_over_a_batch_are_told_from_parts_of_it(server: TorchServeServer) -> None:
    answers = together(server, "passes", rows(3, seed=19, attacked=(1,)))
    assert [a.status_code for a in answers] == [200, 409, 200]
    assert {answers[0].json()["batch"], answers[2].json()["batch"]} == {3}


def test_an_explanation_in_a_batch_exempts_itself_alone(server: TorchServeServer) -> None:
    x, kinds = rows(4, seed=18, attacked=(1, 3)), ["explanations", "predictions", "predictions", "predictions"]
    with ThreadPoolExecutor(4) as pool:
        sent = []
        for row, kind in zip(x, kinds, strict=True):
            sent.append(pool.submit(post, server, "mixed", row, kind))
            time.sleep(0.1)  # the explanation goes first, so that it leads the batch
        answers = [s.result() for s in sent]
    assert [a.status_code for a in answers] == [200, 409, 200, 409]
    statuses = [a.headers["x-fides-status"] for a in answers]
    assert statuses == ["indeterminate", "attacked", "trusted", "attacked"]
    assert answers[2].json()["batch"] == 3  # three predictions and the explanation were one batch


def test_streams_pass_marked(server: TorchServeServer) -> None:
    (row,) = rows(1, seed=17)
    bare, answer = post(server, "barestream", row), post(server, "stream", row)
    assert bare.content == answer.content == b"one two three"
    assert answer.status_code == 200
    assert answer.headers["x-fides-status"] == "indeterminate"
    assert "streamed" in answer.headers["x-fides-reason"]
