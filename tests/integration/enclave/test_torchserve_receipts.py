"""The enclave behind a real TorchServe: receipts in headers, one per request of a batch."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fides_plugins.bundle import Bundle
from fides_plugins.client import AsyncTorchServeClient, TorchServeClient
from fides_plugins.client.trust import EvidenceUrl, Trust
from fides_plugins.launch.torchserve import TorchServeServer
from fides_plugins.serving.torchserve.build import SHIM_NAME, build_archive, bundle_files, shim
from fides_plugins.testing import fake_logits
from tests.integration.test_every_host import HANDLER
from tests.support.pki import NOW_S
from tests.support.triton_models import image_bundle, images, linear_image_onnx
from tests.support.verifiers import IDENTITY, Hardware, RunningVerifier

pytestmark = pytest.mark.integration

CONFIG = """\
batchSize: 8
maxBatchDelay: 40
fides:
  handler: service_handler.py
  bundle: fides_bundle
  mode: observe
  plugins:
    blocked: verifier
    options: {{remote: {{url: "http://{url}"}}}}
"""


class World:
    def __init__(self, folder: Path) -> None:
        self.hardware = Hardware()
        self.bundle = Bundle.load(image_bundle(folder / "bundle"))
        self.verifier = RunningVerifier(self.hardware.verifier(self.bundle))
        self.url = ""

    def options(self, **changes: Any) -> dict[str, Any]:
        policy = self.hardware.policy(self.bundle)
        source = EvidenceUrl(f"http://{self.verifier.http}")
        trust = Trust(policy, source, roots=self.hardware.roots, clock=lambda: NOW_S)
        shared = {
            "bundle": self.bundle,
            "policy": policy,
            "trust": trust,
            "identity": IDENTITY,
            "encode": encode(False),
        }
        return {**shared, **changes}


def encode(lie: bool) -> Any:
    def body(inputs: Mapping[str, NDArray[Any]]) -> tuple[bytes, str]:
        return json.dumps({"image": inputs["image"][0].tolist(), "lie": lie}).encode(), "application/json"

    return body


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("torchserve")
    made = World(folder)
    with made.verifier:
        files = {
            "service_handler.py": HANDLER,
            "service.onnx": linear_image_onnx("image", "logits", noise=0.002),
            SHIM_NAME: shim(),
            **bundle_files(folder / "bundle"),
        }
        build_archive(folder / "digits.mar", SHIM_NAME, files, config=CONFIG.format(url=made.verifier.http))
        with TorchServeServer(folder, {"digits": "digits.mar"}) as server:
            made.url = server.inference_url
            yield made


def row(seed: int) -> dict[str, NDArray[np.float32]]:
    return {"image": images(fake_logits(1, 10, seed=seed))}


def test_an_honest_answer_is_trusted_and_a_lie_is_found(world: World) -> None:
    with TorchServeClient(world.url, "digits", **world.options()) as client:
        answer = client.ask(row(1))
        assert answer.refusal is None, answer.refusal
        assert answer.verdict.status_text.tolist() == ["trusted"]
        assert answer.raw.headers["x-fides-receipt"]
    with TorchServeClient(world.url, "digits", **world.options(encode=encode(True))) as client:
        lied = client.infer(row(1))
        assert lied.status_text.tolist() == ["attacked"]
        assert lied.label.tolist() == answer.verdict.label.tolist()


def test_every_request_of_a_batch_has_its_own_receipt(world: World) -> None:
    async def ask() -> list[Any]:
        async with AsyncTorchServeClient(world.url, "digits", **world.options()) as client:
            return await asyncio.gather(*(client.ask(row(seed)) for seed in range(40)))

    answers = asyncio.run(ask())
    assert [a.refusal for a in answers] == [None] * 40
    assert len({a.raw.headers["x-fides-receipt"] for a in answers}) == 40
    assert sum(a.verdict.counts()["trusted"] for a in answers) >= 37


@pytest.mark.parametrize("scheme", ["hpke", "commitment"])
def test_the_client_may_ask_the_verifier_itself(world: World, scheme: str) -> None:
    options = world.options(scheme=scheme, receipt_from="verifier", verifier_url=f"http://{world.verifier.http}")
    with TorchServeClient(world.url, "digits", **options) as client:
        assert client.infer(row(2)).status_text.tolist() == ["trusted"]
    with TorchServeClient(world.url, "digits", **{**options, "encode": encode(True)}) as client:
        assert client.infer(row(2)).status_text.tolist() == ["attacked"]


def test_z_without_the_verifier_every_answer_is_an_attack(world: World) -> None:
    with TorchServeClient(world.url, "digits", **world.options()) as client:
        assert client.infer(row(3)).status_text.tolist() == ["trusted"]
        world.verifier.stop()
        answer = client.ask(row(3))
    assert answer.refusal is not None
    assert answer.refusal.code == "receipt-missing"
    assert answer.verdict.refused.all()
