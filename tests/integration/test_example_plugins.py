"""Plug-ins in real Triton servers: the four example packages, and a package fresh from `fides plugins new`.

One server holds three replicas of the service (one of them lies) and its trusted copy; another holds the
protected model, in a Python environment into which the packages are installed.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fides_plugins.launch.process import wait_until
from fides_plugins.launch.triton import TritonServer, is_available
from fides_plugins.pipeline import Pipeline
from fides_plugins.settings import Settings
from fides_plugins.testing import fake_logits
from fides_plugins.types import Prediction, Query, Status
from tests.support.paths import REPOSITORY
from tests.support.plugin_environments import install, make_environment, new_package, search_path
from tests.support.triton_models import (
    image_bundle,
    images,
    linear_image_onnx,
    set_parameter,
    template_repository,
)

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(not is_available(), reason="no Triton server for this platform"),
]

LOGITS = fake_logits(4, seed=21)
IMAGES = images(LOGITS)
EXAMPLES = ("consensus", "spotcheck", "webhook", "freivalds")

LIAR = """
import numpy as np
from fides_plugins.serving.triton import onnx_service

class TritonPythonModel(onnx_service.TritonPythonModel):
    def predict(self, arrays):
        lie = np.array(super().predict(arrays)["logits"])
        lie[:, [0, 1, 2]] = lie[:, [1, 2, 0]]
        return {"logits": -lie}
"""
#: A service that hands out what its linear layer is fed with, next to what it claims as its result.
TALKATIVE = """
import json
import numpy as np
from fides_plugins.serving.triton import onnx_service
import triton_python_backend_utils as pb_utils

class TritonPythonModel(onnx_service.TritonPythonModel):
    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        self.attack = json.loads(request.parameters() or "{}").get("attack", "")
        (response,) = super().execute([request])
        return response

    def predict(self, arrays):
        logits = np.array(super().predict(arrays)["logits"])
        if self.attack:
            a, b = np.argsort(logits[0])[-2:]
            logits[0, [a, b]] = logits[0, [b, a]]
        return {"logits": logits, "features": arrays["image"].reshape(len(logits), -1)}
"""


def add_service(repository: Path, name: str, code: str = "") -> None:
    """An unprotected copy of the digits service under another name."""
    shutil.copytree(REPOSITORY / "model_repository" / "digits_base", repository / name)
    (repository / name / "1" / "model.onnx").write_bytes(linear_image_onnx("image", "logits", noise=0.002))
    if code:
        (repository / name / "1" / "model.py").write_text(code)


@pytest.fixture(scope="module")
def replicas(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Addresses of three replicas, of which `south` lies, and of a trusted copy."""
    repository = tmp_path_factory.mktemp("replicas") / "repository"
    for name in ("north", "west", "trusted"):
        add_service(repository, name)
    add_service(repository, "south", LIAR)
    with TritonServer(repository, auto_complete=False) as server:
        yield {n: f"http://{server.http_address}/v2/models/{n}" for n in ("north", "south", "west", "trusted")}


class Alerts:
    """A real HTTP endpoint that keeps what is posted to it."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                outer.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self.send_response(204)
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/alerts"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def wait(self, count: int) -> list[dict[str, Any]]:
        deadline = time.monotonic() + 10
        while len(self.bodies) < count and time.monotonic() < deadline:
            time.sleep(0.02)
        return self.bodies


@pytest.fixture(scope="module")
def alerts() -> Iterator[Alerts]:
    endpoint = Alerts()
    yield endpoint
    endpoint.server.shutdown()
    endpoint.server.server_close()


@pytest.fixture(scope="module")
def protected(
    tmp_path_factory: pytest.TempPathFactory, replicas: dict[str, str], alerts: Alerts
) -> Iterator[tuple[TritonServer, Path]]:
    """A Triton whose `digits__fides` runs all four example packages, and nothing built in but the verifier."""
    root = tmp_path_factory.mktemp("examples")
    repository = template_repository(root / "repository", mode="flag")
    weights = root / "layer.npz"
    np.savez(weights, weight=_weight(), bias=np.zeros(10, np.float32))
    (repository / "digits_base" / "1" / "model.py").write_text(TALKATIVE)
    _hand_features_over(repository)
    options = {
        "plugins.required": "consensus,spotcheck,webhook,freivalds",
        "plugins.blocked": "detector,reclassifier",
        "plugins.options.consensus.replicas": ",".join(f"{n}={replicas[n]}" for n in ("north", "south", "west")),
        "plugins.options.spotcheck.endpoint": replicas["trusted"],
        "plugins.options.spotcheck.share": "1",
        "plugins.options.spotcheck.evidence": str(root / "evidence.jsonl"),
        "plugins.options.webhook.url": alerts.url,
        "plugins.options.freivalds.weights": str(weights),
        "plugins.options.freivalds.input": "features",
    }
    # Every step of Fides is a process of its own that loads the installed plug-ins, so each needs their options.
    for step in repository.glob("fides_*"):
        for key, value in options.items():
            set_parameter(step / "config.pbtxt", f"fides.{key}", value)
    python = make_environment(root / "venv", *(REPOSITORY / "examples" / f"fides-{name}" for name in EXAMPLES))
    with TritonServer(repository, auto_complete=False, env=search_path(python)) as server:
        yield server, root


def _weight() -> np.ndarray[Any, Any]:
    """The weight inside the service's own graph, (64, 10)."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load_from_string(linear_image_onnx("image", "logits", noise=0.002)).graph
    return numpy_helper.to_array(graph.initializer[0])


def _hand_features_over(repository: Path) -> None:
    """Give the service an output `features`, and map it onto an input of the validating step."""
    base = repository / "digits_base" / "config.pbtxt"
    base.write_text(base.read_text() + 'output [ { name: "features" data_type: TYPE_FP32 dims: [ 64 ] } ]\n')
    step = repository / "fides_validate" / "config.pbtxt"
    step.write_text(step.read_text() + 'input [ { name: "features" data_type: TYPE_FP32 dims: [ 64 ] } ]\n')
    for name in ("digits", "digits__fides"):
        config = repository / name / "config.pbtxt"
        text = config.read_text()
        made = 'output_map { key: "logits" value: "service_logits" }'
        used = 'input_map { key: "logits" value: "service_logits" }'
        text = text.replace(made, f'{made}\n      output_map {{ key: "features" value: "features" }}')
        text = text.replace(used, f'{used}\n      input_map {{ key: "features" value: "features" }}')
        config.write_text(text)


def ask(server: TritonServer, array: np.ndarray[Any, Any], attack: str = "", request_id: str = "") -> Any:
    """Ordinary client code; the request parameter `attack` makes the service lie."""
    import tritonclient.http

    with tritonclient.http.InferenceServerClient(server.http_address, network_timeout=30) as client:
        tensor = tritonclient.http.InferInput("image", list(array.shape), "FP32")
        tensor.set_data_from_numpy(array)
        parameters = {"attack": attack} if attack else None
        return client.infer("digits__fides", [tensor], request_id=request_id, parameters=parameters)


def statuses(result: Any) -> list[str]:
    return [s.decode() for s in result.as_numpy("FIDES_STATUS").ravel()]


def test_honest_answers_are_trusted_and_the_lying_replica_is_named(protected: tuple[TritonServer, Path]) -> None:
    server, _ = protected
    result = ask(server, IMAGES)
    assert statuses(result) == ["trusted"] * 4
    assert result.as_numpy("logits").argmax(axis=1).tolist() == LOGITS.argmax(axis=1).tolist()
    # A stub's log reaches the server's by a thread of its own.
    wait_until(lambda: "outvoted: south in 4 row(s)" in server.log(200), 10, "The warning")


def test_a_lying_service_is_found_by_three_plugins_alerted_and_evidenced(
    protected: tuple[TritonServer, Path], alerts: Alerts
) -> None:
    server, root = protected
    before = len(alerts.bodies)
    result = ask(server, IMAGES, attack="0", request_id="case-7")

    assert statuses(result) == ["attacked", "trusted", "trusted", "trusted"]
    reason = result.as_numpy("FIDES_REASON").ravel()[0].decode()
    assert "consensus, outvoting south" in reason
    assert "spotcheck" in reason
    assert "freivalds" in reason

    alert = alerts.wait(before + 1)[before]
    assert alert["rows"][0]["request_id"] == "case-7#0"
    assert alert["rows"][0]["verified_label"] == int(LOGITS[0].argmax())

    line = json.loads((root / "evidence.jsonl").read_text().splitlines()[-1])
    assert line["request_id"] == "case-7#0"
    assert line["trusted"]["label"] == int(LOGITS[0].argmax()) != line["service"]["label"]
    assert len(line["input_sha256"]) == 64


def test_the_lying_replica_is_named_in_process_too(replicas: dict[str, str], tmp_path: Path) -> None:
    sys.path.insert(0, str(REPOSITORY / "examples" / "fides-consensus" / "src"))
    try:
        from fides_consensus import NAME, Consensus
    finally:
        sys.path.pop(0)
    image_bundle(tmp_path / "bundle")
    trio = {n: replicas[n] for n in ("north", "south", "west")}
    settings = Settings.from_mapping(
        {
            "bundle": "bundle",
            "mode": "flag",
            "plugins": {"entry_points": False, "options": {NAME: {"replicas": trio}}},
        }
    )
    plugin = Consensus()
    pipeline = Pipeline.from_settings(settings, tmp_path, {NAME: plugin})
    verdict = pipeline.run(Query({"image": IMAGES}), Prediction.from_output(LOGITS, "logits"))
    pipeline.close()
    assert plugin.outvoted == {"south": 4}
    assert (verdict.status == Status.TRUSTED).all()


ALWAYS = "        return Detection(np.ones(service.n_rows), np.ones(service.n_rows, bool), source=NAME)\n"


def test_a_new_package_that_always_alarms_changes_verdicts_through_triton(tmp_path: Path) -> None:
    repository = template_repository(tmp_path / "repository", mode="flag")
    before = {p: p.read_bytes() for p in repository.rglob("*") if p.is_file()}
    package = new_package("fides-quiet-hours", "detect", tmp_path)
    source = package / "src" / "fides_quiet_hours" / "__init__.py"
    made = source.read_text()
    python = make_environment(tmp_path / "venv", package)
    answers = []
    for text in (made, _always_alarming(made)):
        source.write_text(text)
        install(python, package)
        with TritonServer(repository, auto_complete=False, env=search_path(python)) as server:
            answers.append(ask(server, IMAGES))
    assert statuses(answers[0]) == ["trusted"] * 4
    assert statuses(answers[1]) == ["attacked"] * 4
    assert b"quiet-hours" in answers[1].as_numpy("FIDES_REASON").ravel()[0]
    # The package alone was touched: the repository that Triton serves is what it was.
    after = {p: p.read_bytes() for p in repository.rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    assert after == before


def _always_alarming(source: str) -> str:
    head, _, _ = source.partition("        rows = np.arange(service.n_rows)\n")
    return head + ALWAYS


@pytest.mark.slow
def test_a_new_package_works_in_an_environment_with_nothing_else(tmp_path: Path) -> None:
    """As its author's colleague would: an empty environment, pip, the index, pytest."""
    package = new_package("fides-quiet-hours", "detect", tmp_path)
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True, timeout=120)
    python = str(tmp_path / "venv" / "bin" / "python")
    pip = [python, "-m", "pip", "install", "-q", f"{REPOSITORY}[testing]", f"{package}[test]"]
    done = subprocess.run(pip, capture_output=True, text=True, timeout=280)
    if done.returncode and ("No matching distribution" in done.stderr or "ConnectionError" in done.stderr):
        pytest.skip("no package index can be reached")
    assert done.returncode == 0, done.stderr[-2000:]
    done = subprocess.run([python, "-m", "pytest", "-q", str(package)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-2000:]
    assert "3 passed" in done.stdout
    listed = subprocess.run([python, "-m", "fides_plugins.cli", "plugins"], capture_output=True, text=True, timeout=60)
    assert "quiet-hours" in listed.stdout
    assert listed.returncode == 0
    frozen = subprocess.run([python, "-m", "pip", "list"], capture_output=True, text=True, timeout=60).stdout
    assert "torch" not in frozen
