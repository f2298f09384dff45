"""What an operator does with a protected Triton: check it, withdraw its alarm, notice that it is dead."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from fides_plugins.serving.process import wait_until
from fides_plugins.serving.triton.api import TritonApi
from fides_plugins.serving.triton.attach import attach
from fides_plugins.serving.triton.check import check
from fides_plugins.serving.triton.plan import AttachOptions
from fides_plugins.serving.triton.server import TritonServer, is_available
from fides_plugins.testing import fake_logits
from tests.triton_models import STRANGER_CONFIG, image_bundle, images, linear_image_onnx, stranger_repository

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(not is_available(), reason="no Triton server for this platform"),
]

PIXELS = images(fake_logits(4, seed=31))


def make_repository(root: Path) -> Path:
    """`flowers`, and `roses`, whose service model disagrees with the verification model on noise."""
    repository = stranger_repository(root / "repository")
    stranger_repository(repository, STRANGER_CONFIG.replace('"flowers"', '"roses"'), model="roses")
    (repository / "roses" / "3" / "net.onnx").write_bytes(linear_image_onnx("pixels_in", "scores", noise=2.0))
    bundle = image_bundle(root / "bundle")
    for model in ("flowers", "roses"):
        attach(repository, model, AttachOptions(bundle, settings={"mode": "flag"}))
    return repository


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_repository(tmp_path_factory.mktemp("operations"))


@pytest.fixture(scope="module")
def server(repository: Path) -> Iterator[TritonServer]:
    with TritonServer(repository, explicit=True, config_name="fides", auto_complete=False, grace_s=1.0) as running:
        yield running


def value(api: TritonApi, series: str) -> float | None:
    """One series of the metrics page; None where it is not there."""
    found = re.search(rf"^{re.escape(series)} (\S+)$", api.metrics(), re.MULTILINE)
    return None if found is None else float(found[1])


def verdicts(api: TritonApi, model: str) -> dict[str, float | None]:
    return {s: value(api, f'fides_verdicts_total{{model="{model}",status="{s}"}}') for s in ("attacked", "trusted")}


def test_checks_never_raise_the_service_alarm(server: TritonServer) -> None:
    """Of noise the two models of `roses` think differently, as trained models do: it would count as attacked."""
    api = server.api
    for _ in range(5):
        findings = {f.what: f for f in check(api, "roses")}
        assert all(f.good for f in findings.values())
        assert findings["validation"].detail == "verdict: attacked"
        assert "it would be counted as attacked. Give benign rows with --data" in findings["protected model"].detail
    findings = {f.what: f for f in check(api, "flowers", {"pixels_in": PIXELS[:1]})}
    assert findings["protected model"].seconds > 0
    wait_until(lambda: verdicts(api, "flowers") == {"attacked": 0, "trusted": 1}, 10, "The benign row's count")
    assert verdicts(api, "roses") == {"attacked": 0, "trusted": 0}
    assert not value(api, 'fides_under_attack{model="roses"}')
