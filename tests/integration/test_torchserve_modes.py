"""A real TorchServe with one protected model per mode, and bad requests sent to it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from fides_plugins.launch.process import wait_until
from fides_plugins.launch.torchserve import TorchServeServer
from fides_plugins.pipeline import Pipeline
from fides_plugins.settings import Settings
from fides_plugins.types import Prediction, Query
from tests.support.torchserve_models import body, plain_archive, protected_archive, rows

pytestmark = pytest.mark.integration

MODES = ("observe", "flag", "correct", "reject")


@pytest.fixture(scope="module")
def server(backdoor_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TorchServeServer]:
    store = tmp_path_factory.mktemp("store")
    plain_archive(store, name="bare")
    for mode in MODES:
        protected_archive(store, mode, backdoor_folder, mode=mode)
    protected_archive(store, "closed", backdoor_folder, mode="flag", on_error="closed")
    changed = {"fides_bundle/verification.onnx": b"not the bytes that fides.json names"}
    protected_archive(store, "changed", backdoor_folder, files=changed, mode="flag", on_error="open")
    models = {p.stem: p.name for p in store.glob("*.mar")}
    with TorchServeServer(store, models, batch_size=1) as running:
        yield running


def post(server: TorchServeServer, model: str, content: Any = None, raw: bytes | None = None) -> httpx.Response:
    url = f"{server.inference_url}/predictions/{model}"
    headers = {"content-type": "application/json"}
    return httpx.post(url, content=json.dumps(content) if raw is None else raw, headers=headers, timeout=30)


def fides_headers(answer: httpx.Response) -> dict[str, str]:
    return {k: v for k, v in answer.headers.items() if k.startswith("x-fides-")}


def test_observe_changes_nothing(server: TorchServeServer) -> None:
    for row in rows(6, attacked=(1, 4)):
        bare, observed = post(server, "bare", body(row)), post(server, "observe", body(row))
        assert observed.content == bare.content
        assert observed.status_code == bare.status_code == 200
        assert not fides_headers(observed)
        assert set(observed.headers) == set(bare.headers)


def test_flag_marks_and_leaves_the_body(server: TorchServeServer) -> None:
    for index, row in enumerate(rows(6, attacked=(1, 4))):
        bare, flagged = post(server, "bare", body(row)), post(server, "flag", body(row))
        assert flagged.content == bare.content
        assert flagged.headers["x-fides-status"] == ("attacked" if index in (1, 4) else "trusted")
        assert 0 <= float(flagged.headers["x-fides-score"]) <= 1
        assert 0 < float(flagged.headers["x-fides-p-value"]) <= 1
        assert int(flagged.headers["x-fides-label"]) == row[:10].argmax()


def test_correct_repairs_only_attacked_answers(server: TorchServeServer) -> None:
    for index, row in enumerate(rows(6, attacked=(1, 4))):
        honest = row.copy()
        honest[-1] = 0
        bare, corrected = post(server, "bare", body(honest)), post(server, "correct", body(row))
        if index not in (1, 4):
            assert corrected.content == bare.content
            continue
        assert list(corrected.json()) == list(bare.json())
        assert corrected.json()["label"] == bare.json()["label"]
        np.testing.assert_allclose(corrected.json()["probabilities"], bare.json()["probabilities"], atol=1e-5)


def test_reject_refuses_only_attacked_answers(server: TorchServeServer) -> None:
    for index, row in enumerate(rows(6, attacked=(1, 4))):
        bare, judged = post(server, "bare", body(row)), post(server, "reject", body(row))
        if index not in (1, 4):
            assert (judged.status_code, judged.content) == (200, bare.content)
            continue
        assert judged.status_code == 409
        assert judged.headers["content-type"] == "application/json"
        assert judged.json()["type"] == "FidesAttackDetected"
        assert judged.json()["fides"]["status"] == "attacked"
        assert judged.json()["fides"]["reason"]
        assert "probabilities" not in judged.text
        assert "label" not in judged.json()["fides"]


def test_same_verdict_as_in_process(server: TorchServeServer, backdoor_folder: Path) -> None:
    x = rows(8, seed=5, attacked=(0, 3, 6))
    service = x[:, :10].copy()
    for row in (0, 3, 6):
        top = service[row].argsort()[-2:]
        service[row, top] = service[row, top[::-1]]
    pipeline = Pipeline.from_settings(Settings(bundle=str(backdoor_folder), mode="flag"))
    verdict = pipeline.run(Query({"pixels": x}), Prediction.from_output(service + 0.01, "logits"))
    for index, row in enumerate(x):
        got = fides_headers(post(server, "flag", body(row)))
        assert got["x-fides-status"] == verdict.status_text[index]
        assert float(got["x-fides-score"]) == pytest.approx(float(verdict.score[index]), abs=1e-5)
        assert float(got["x-fides-p-value"]) == pytest.approx(float(verdict.p_value[index]), rel=1e-4)
        assert int(got["x-fides-label"]) == verdict.label[index]


BAD = {
    "wrong shape": {"x": [[0.0] * 11] * 2},
    "too few classes": {"x": [0.0] * 5},
    "text instead of numbers": {"x": ["a"] * 11},
    "not a number": {"x": [float("nan")] + [0.0] * 10},
    "infinite": {"x": [float("inf")] + [0.0] * 10},
    "empty": {"x": []},
    "no input": {"y": [0.0] * 11},
    "not json": None,
}


@pytest.mark.parametrize("what", BAD)
@pytest.mark.parametrize("model", ["flag", "correct", "reject", "closed"])
def test_bad_requests_are_never_trusted(server: TorchServeServer, model: str, what: str) -> None:
    content = BAD[what]
    raw = b"\x00garbage" if content is None else None
    bare, answer = post(server, "bare", content, raw), post(server, model, content, raw)
    assert answer.headers.get("x-fides-status") != "trusted"
    if bare.status_code != 200:
        # The original handler's own refusal passes as it is.
        assert (answer.status_code, answer.text) == (bare.status_code, bare.text)
    elif model == "closed":
        assert answer.status_code == 503
        assert answer.json()["type"] == "FidesVerificationUnavailable"
    else:
        assert answer.headers["x-fides-status"] in ("error", "indeterminate")
        assert answer.headers["x-fides-reason"]
    assert "Traceback" not in answer.text
    assert "/" not in answer.headers.get("x-fides-reason", "")
    good = rows(1)[0]
    after = post(server, model, body(good))
    assert (after.status_code, after.headers["x-fides-status"]) == (200, "trusted")


def test_changed_bundle_is_named_and_the_service_goes_on(server: TorchServeServer) -> None:
    row = rows(1)[0]
    answer = post(server, "changed", body(row))
    assert answer.status_code == 200
    assert answer.content == post(server, "bare", body(row)).content
    assert answer.headers["x-fides-status"] == "error"
    assert "verification.onnx was changed" in answer.headers["x-fides-reason"]


def gauge(page: str, name: str, model: str) -> float:
    (value,) = re.findall(rf'^{name}{{model="{model}",[^}}]*}} (\S+)$', page, re.MULTILINE)
    return float(value)


def test_metrics_have_the_names_of_triton(server: TorchServeServer) -> None:
    for row in rows(30, seed=9, attacked=tuple(range(30))):
        assert post(server, "reject", body(row)).status_code == 409

    def page() -> str:
        return httpx.get(server.metrics_url, timeout=10).text

    # The service as a whole is under attack, and says so within a second of the last row.
    wait_until(lambda: gauge(page(), "fides_under_attack", "reject") == 1, 10, "the alarm")
    text = page()
    assert gauge(text, "fides_monitor_log_e_value", "reject") >= math.log(1e6)
    assert gauge(text, "fides_false_alarm_rate", "reject") == 0.01
    assert 'fides_verdicts_total{model="reject",status="attacked"' in text
    assert 'fides_plugin_errors_total{model="reject",plugin="verifier"' in text
    assert 'fides_score_count{model="reject"' in text
    for stage in ("verify", "detect", "reclassify"):
        assert f'fides_stage_seconds_count{{model="reject",stage="{stage}"' in text
