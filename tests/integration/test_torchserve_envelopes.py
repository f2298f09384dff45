"""Requests of several rows, in TorchServe's service envelopes and in bodies, on real servers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from fides_plugins.launch.torchserve import TorchServeServer
from tests.support.torchserve_models import body, kserve_v2, protected_archive, rows

pytestmark = pytest.mark.integration

CONFIG = "batchSize: 8\nmaxBatchDelay: 1500\n"
QUICK = "batchSize: 8\nmaxBatchDelay: 30\n"


@pytest.fixture(scope="module")
def enveloped(backdoor_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TorchServeServer]:
    store = tmp_path_factory.mktemp("enveloped")
    protected_archive(store, "reject", backdoor_folder, mode="reject", config=CONFIG)
    protected_archive(store, "correct", backdoor_folder, mode="correct", config=QUICK)
    protected_archive(store, "quick", backdoor_folder, mode="reject", config=QUICK)
    models = {p.stem: p.name for p in store.glob("*.mar")}
    with TorchServeServer(store, models, properties={"service_envelope": "json"}) as running:
        yield running


@pytest.fixture(scope="module")
def bare(backdoor_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TorchServeServer]:
    store = tmp_path_factory.mktemp("bare")
    protected_archive(store, "reject", backdoor_folder, "instances", mode="reject", config=QUICK)
    protected_archive(store, "correct", backdoor_folder, "instances", mode="correct", config=QUICK)
    models = {p.stem: p.name for p in store.glob("*.mar")}
    with TorchServeServer(store, models) as running:
        yield running


@pytest.fixture(scope="module")
def tensors(backdoor_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TorchServeServer]:
    store = tmp_path_factory.mktemp("tensors")
    protected_archive(store, "reject", backdoor_folder, "inputs", mode="reject")
    properties = {"service_envelope": "kservev2", "ts_open_inference_protocol": "true"}
    with TorchServeServer(store, {"reject": "reject.mar"}, properties=properties) as running:
        yield running


def together(server: TorchServeServer, model: str, groups: Sequence[np.ndarray], wrap: bool) -> list[httpx.Response]:
    """One request for each group of rows, all at once. The envelope hands each instance over as a request's body."""

    def send(group: np.ndarray) -> httpx.Response:
        instances = [{"body": body(row)} if wrap else body(row) for row in group]
        url = f"{server.inference_url}/predictions/{model}"
        return httpx.post(url, json={"instances": instances}, timeout=30)

    with ThreadPoolExecutor(len(groups)) as pool:
        return list(pool.map(send, groups))


def test_a_client_with_two_instances_opens_no_door(enveloped: TorchServeServer) -> None:
    """Eight clients, swapped weights: each got 409; where one of them sent two instances, each got its lie."""
    x = rows(9, seed=41, attacked=tuple(range(9)))
    answers = together(enveloped, "reject", [x[:1], x[1:3], *np.split(x[3:], 6)], wrap=True)
    assert [a.status_code for a in answers] == [409] * 8
    for answer in answers:
        # A refusal is the whole body, not one of the envelope's predictions.
        assert answer.json()["type"] == "FidesAttackDetected"
        assert "predictions" not in answer.json()


def test_each_client_of_an_envelope_answers_for_its_own_rows(enveloped: TorchServeServer) -> None:
    x = rows(9, seed=42, attacked=(2, 8))
    answers = together(enveloped, "reject", [x[:1], x[1:3], *np.split(x[3:], 6)], wrap=True)
    assert [a.status_code for a in answers] == [200, 409, 200, 200, 200, 200, 200, 409]
    labels = [p["label"] for a in answers if a.status_code == 200 for p in a.json()["predictions"]]
    assert labels == [int(row[:10].argmax()) for row in x[[0, 3, 4, 5, 6, 7]]]


def test_inputs_of_one_kserve_v2_request(tensors: TorchServeServer) -> None:
    url = f"{tensors.inference_url}/predictions/reject"
    honest = httpx.post(url, json=kserve_v2(rows(2, seed=43)), timeout=30)
    assert (honest.status_code, honest.headers["x-fides-status"]) == (200, "trusted")
    assert len(honest.json()["outputs"]) == 2
    refused = httpx.post(url, json=kserve_v2(rows(2, seed=43, attacked=(1,))), timeout=30)
    assert (refused.status_code, refused.headers["x-fides-status"]) == (409, "attacked")
    assert "outputs" not in refused.json()


def test_a_refusal_over_the_open_inference_protocol_is_a_failed_call(tensors: TorchServeServer) -> None:
    """Its gRPC reads tensors in every body and knows no status of one request."""
    import grpc
    from tritonclient.grpc import service_pb2 as oip

    def request(x: np.ndarray) -> Any:
        made = oip.ModelInferRequest(model_name="reject", id="7")
        for index, row in enumerate(x):
            tensor = made.inputs.add(name=f"row-{index}", datatype="FP32", shape=[len(row)])
            tensor.contents.fp32_contents.extend(row.tolist())
        return made

    with grpc.insecure_channel(tensors.grpc_target) as channel:
        infer = channel.unary_unary(
            "/org.pytorch.serve.grpc.openinference.GRPCInferenceService/ModelInfer",
            request_serializer=oip.ModelInferRequest.SerializeToString,
            response_deserializer=oip.ModelInferResponse.FromString,
        )
        assert len(infer(request(rows(2, seed=44)), timeout=30).outputs) == 2
        with pytest.raises(grpc.RpcError) as caught:
            infer(request(rows(2, seed=44, attacked=(0,))), timeout=30)
        assert caught.value.code() is not grpc.StatusCode.DEADLINE_EXCEEDED
        assert "tampered" in caught.value.details()


@pytest.mark.parametrize("mode", ["reject", "correct"])
@pytest.mark.parametrize("envelope", [True, False])
def test_no_mix_of_clients_gets_an_attacked_row(
    enveloped: TorchServeServer, bare: TorchServeServer, mode: str, envelope: bool
) -> None:
    """Some hundred batches of clients with one to three rows each, any of them attacked."""
    random = np.random.default_rng(45)
    server, model = (enveloped, "quick" if mode == "reject" else mode) if envelope else (bare, mode)
    for round_ in range(30):
        groups = []
        for _ in range(int(random.integers(1, 6))):
            n = int(random.integers(1, 4))
            attacked = tuple(np.flatnonzero(random.random(n) < 0.3).tolist())
            groups.append(rows(n, seed=1000 * round_ + len(groups), attacked=attacked))
        for group, answer in zip(groups, together(server, model, groups, wrap=envelope), strict=True):
            lies = bool(group[:, 10].any())
            if mode == "reject":
                assert answer.status_code == (409 if lies else 200)
            if answer.status_code == 200:
                honest = [int(row[:10].argmax()) for row in group]
                assert [p["label"] for p in answer.json()["predictions"]] == honest
