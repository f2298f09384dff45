"""One query through every host: in process, a real Triton, a real TorchServe, the same bundle and service."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray

from fides_plugins import Prediction, Query
from fides_plugins.launch.torchserve import TorchServeServer
from fides_plugins.launch.triton import TritonServer
from fides_plugins.onnx_model import OnnxModel
from fides_plugins.pipeline import Pipeline
from fides_plugins.serving.torchserve.build import SHIM_NAME, build_archive, bundle_files, shim
from fides_plugins.settings import Settings
from fides_plugins.testing import fake_logits
from tests.support.triton_models import image_bundle, images, linear_image_onnx, template_repository

pytestmark = pytest.mark.integration

ROWS = 12
LIES = (1, 4, 9)

HANDLER = """
import json, os
import numpy as np
from fides_plugins.onnx_model import OnnxModel

class Handler:
    def initialize(self, context):
        folder = context.system_properties["model_dir"]
        self.model = OnnxModel(open(os.path.join(folder, "service.onnx"), "rb").read())
        self.initialized = True

    def inference(self, image):
        logits = np.array(self.model.run({"image": image})["logits"])
        for row in self.lies:
            a, b = np.argsort(logits[row])[-2:]
            logits[row, [a, b]] = logits[row, [b, a]]
        return logits

    def handle(self, data, context):
        bodies = [r.get("body") or r.get("data") for r in data]
        bodies = [json.loads(b) if isinstance(b, (bytes, bytearray)) else b for b in bodies]
        self.lies = [i for i, b in enumerate(bodies) if b["lie"]]
        return self.inference(np.asarray([b["image"] for b in bodies], np.float32)).tolist()
"""


@dataclass
class Seen:
    """What a client sees of a verdict."""

    status: list[str]
    label: list[int]
    score: NDArray[np.float64]
    p_value: NDArray[np.float64]

    def check(self, other: Seen) -> None:
        assert self.status == other.status
        assert self.label == other.label
        np.testing.assert_allclose(self.score, other.score, atol=2e-6)
        np.testing.assert_allclose(self.p_value, other.p_value, atol=2e-6)


@pytest.fixture(scope="module")
def rows() -> NDArray[np.float32]:
    return images(fake_logits(ROWS, 10, seed=21))


@pytest.fixture(scope="module")
def in_process(tmp_path_factory: pytest.TempPathFactory, rows: NDArray[np.float32]) -> Seen:
    bundle = image_bundle(tmp_path_factory.mktemp("here") / "bundle")
    logits = np.array(OnnxModel(linear_image_onnx("image", "logits", noise=0.002)).run({"image": rows})["logits"])
    for row in LIES:
        a, b = np.argsort(logits[row])[-2:]
        logits[row, [a, b]] = logits[row, [b, a]]
    pipeline = Pipeline.from_settings(Settings(bundle=str(bundle), mode="flag"))
    verdict = pipeline.run(Query({"image": rows}), Prediction.from_output(logits, "logits"))
    seen = Seen(verdict.status_text.tolist(), verdict.label.tolist(), verdict.score, verdict.p_value)
    # Guards the comparison itself: it would be empty if every row had the same verdict.
    assert [i for i, s in enumerate(seen.status) if s == "attacked"] == list(LIES)
    return seen


def test_triton_gives_the_verdict_of_the_pipeline(tmp_path: Path, rows: NDArray[np.float32], in_process: Seen):
    repository = template_repository(tmp_path / "repository", mode="flag")
    with TritonServer(repository) as server:
        attack = ",".join(map(str, LIES))
        answer = server.api.infer("digits__fides", {"image": rows}, parameters={"attack": attack})
    Seen(
        [s.decode() if isinstance(s, bytes) else str(s) for s in answer["FIDES_STATUS"].ravel()],
        answer["FIDES_LABEL"].ravel().tolist(),
        answer["FIDES_SCORE"].ravel(),
        answer["FIDES_P_VALUE"].ravel(),
    ).check(in_process)


@pytest.fixture
def torchserve(tmp_path: Path) -> Iterator[TorchServeServer]:
    bundle = image_bundle(tmp_path / "bundle")
    files = {
        "service_handler.py": HANDLER,
        "service.onnx": linear_image_onnx("image", "logits", noise=0.002),
        SHIM_NAME: shim(),
        **bundle_files(bundle),
    }
    config = "fides:\n  handler: service_handler.py\n  bundle: fides_bundle\n  mode: flag\n"
    build_archive(tmp_path / "digits.mar", SHIM_NAME, files, config=config)
    with TorchServeServer(tmp_path, {"digits": "digits.mar"}) as server:
        yield server


def test_torchserve_gives_the_verdict_of_the_pipeline(
    torchserve: TorchServeServer, rows: NDArray[np.float32], in_process: Seen
):
    headers = []
    with httpx.Client(base_url=torchserve.inference_url, timeout=30) as client:
        for index, image in enumerate(rows):
            body = json.dumps({"image": image.tolist(), "lie": index in LIES})
            headers.append(client.post("/predictions/digits", content=body).raise_for_status().headers)
    Seen(
        [h["x-fides-status"] for h in headers],
        [int(h["x-fides-label"]) for h in headers],
        np.array([float(h["x-fides-score"]) for h in headers]),
        np.array([float(h["x-fides-p-value"]) for h in headers]),
    ).check(in_process)
