"""Archives of strangers, one per kind of handler: attached, served over HTTP and gRPC, attacked, detached."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from fides_plugins.launch.torchserve import TorchServeServer
from fides_plugins.launch.torchserve_grpc import GrpcClient
from fides_plugins.serving.torchserve.attach import attach, detach
from fides_plugins.serving.torchserve.build import build_archive
from tests.support.torchserve_models import (
    HANDLERS,
    PURE_PARSER,
    backdoor_bundle,
    body,
    plain_archive,
    post,
    rows,
    torchscript,
)

pytestmark = pytest.mark.integration

KINDS = tuple(HANDLERS)


def entries(path: Path) -> list[tuple[Any, ...]]:
    with zipfile.ZipFile(path) as archive:
        return [
            (i.filename, i.date_time, i.compress_type, i.external_attr, archive.read(i)) for i in archive.infolist()
        ]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kinds")
    bundle = folder / "bundle"
    backdoor_bundle(bundle)
    (folder / "plain").mkdir()
    (folder / "served").mkdir()
    plain_archive(folder / "served", name="bare")
    for kind in KINDS:
        plain = plain_archive(folder / "plain", kind, config="# kept\nminWorkers: 1\nmaxWorkers: 1\n")
        extra = PURE_PARSER if kind == "pure" else {}
        done = attach(plain, bundle, folder / "served" / plain.name, {"mode": "correct", **extra})
        assert done.original_handler == HANDLERS[kind][0]
        assert done.handler
    return folder


@pytest.fixture(scope="module")
def server(store: Path) -> Iterator[TorchServeServer]:
    models = {p.stem: p.name for p in (store / "served").glob("*.mar")}
    with TorchServeServer(store / "served", models) as running:
        yield running


@pytest.mark.parametrize("kind", KINDS)
def test_honest_answers_are_unchanged_and_trusted(server: TorchServeServer, kind: str) -> None:
    for row in rows(3, seed=1):
        answer = post(server, kind, row)
        assert answer.content == post(server, "bare", row).content
        assert answer.headers["x-fides-status"] == "trusted"
        assert int(answer.headers["x-fides-label"]) == row[:10].argmax()


@pytest.mark.parametrize("kind", KINDS)
def test_attacked_answers_are_corrected(server: TorchServeServer, kind: str) -> None:
    (attacked,) = rows(1, seed=2, attacked=(0,))
    honest = attacked.copy()
    honest[-1] = 0
    lie = post(server, "bare", attacked).json()
    truth = post(server, "bare", honest).json()
    assert lie["label"] != truth["label"]
    answer = post(server, kind, attacked)
    assert answer.headers["x-fides-status"] == "attacked"
    assert list(answer.json()) == list(truth)
    np.testing.assert_allclose(answer.json()["probabilities"], truth["probabilities"], atol=1e-5)
    if kind != "pure":  # a function alone has no place to correct but the named key
        assert answer.json()["label"] == truth["label"]


@pytest.mark.parametrize("kind", KINDS)
def test_grpc_carries_the_verdict_in_an_envelope_when_asked(server: TorchServeServer, kind: str) -> None:
    (honest,) = rows(1, seed=3)
    (attacked,) = rows(1, seed=3, attacked=(0,))
    with GrpcClient(server.grpc_target) as client:
        plain = client.predict(kind, {"data": json.dumps(body(honest)).encode()})
        assert plain == post(server, "bare", honest).content
        for row, status in ((honest, "trusted"), (attacked, "attacked")):
            asked = {"data": json.dumps(body(row)).encode(), "x-fides-envelope": b"1"}
            answer = json.loads(client.predict(kind, asked))
            assert answer["fides"]["status"] == status
            assert answer["fides"]["class_name"] == f"class {honest[:10].argmax()}"
            assert answer["response_encoding"] == "json"
            probabilities = answer["response"]["probabilities"]
            np.testing.assert_allclose(probabilities, json.loads(plain)["probabilities"], atol=1e-5)


def test_envelope_over_http_when_asked(server: TorchServeServer) -> None:
    (row,) = rows(1, seed=4)
    answer = post(server, "class", row, **{"X-Fides-Envelope": "1"})
    assert answer.json()["fides"]["status"] == "trusted"
    assert answer.json()["response"] == post(server, "bare", row).json()


@pytest.mark.parametrize("kind", KINDS)
def test_detached_archive_equals_the_original(store: Path, tmp_path: Path, kind: str) -> None:
    original = store / "plain" / f"{kind}.mar"
    detach(store / "served" / f"{kind}.mar", tmp_path / "back.mar")
    assert entries(tmp_path / "back.mar") == entries(original)


def test_built_in_handler_with_an_envelope_of_the_server(tmp_path: Path) -> None:
    """`base_handler`, a TorchScript model, logits as the answer, and `service_envelope=body`."""
    backdoor_bundle(tmp_path / "bundle")
    store = tmp_path / "store"
    store.mkdir()
    files = {"model.pt": torchscript()}
    bare = build_archive(store / "bare.mar", "base_handler", files, serialized_file="model.pt")  # type: ignore[arg-type]
    attach(bare, tmp_path / "bundle", store / "protected.mar", {"mode": "correct"})
    attach(bare, tmp_path / "bundle", store / "strict.mar", {"mode": "reject"})
    models = {"bare": "bare.mar", "protected": "protected.mar", "strict": "strict.mar"}
    with TorchServeServer(store, models, properties={"service_envelope": "body"}) as server:

        def ask(model: str, row: np.ndarray) -> httpx.Response:
            values = [float(v) for v in row]
            return httpx.post(f"{server.inference_url}/predictions/{model}", json=values, timeout=30)

        honest, attacked = rows(1, seed=6)[0], rows(1, seed=6, attacked=(0,))[0]
        answer = ask("protected", honest)
        assert answer.status_code == 200, server.log()
        assert answer.content == ask("bare", honest).content
        assert answer.headers["x-fides-status"] == "trusted"
        lie, corrected = ask("bare", attacked).json(), ask("protected", attacked)
        assert np.argmax(lie) != honest[:10].argmax() == np.argmax(corrected.json())
        assert corrected.headers["x-fides-status"] == "attacked"
        assert ask("strict", attacked).status_code == 409
