"""The repository `model_repository/` in a real Triton: every mode, bad input, a bundle changed on disk."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from numpy.typing import NDArray

from fides_plugins.errors import ServerError
from fides_plugins.launch.process import wait_until
from fides_plugins.launch.triton import TritonServer, is_available
from fides_plugins.pipeline import Pipeline
from fides_plugins.serving.triton.operator.api import InferenceRefused, TritonApi
from fides_plugins.settings import Settings
from fides_plugins.testing import fake_logits, make_bundle
from fides_plugins.types import Prediction, Query, softmax
from tests.support.triton_models import add_mode, images, template_repository

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(not is_available(), reason="no Triton server for this platform"),
]

LOGITS = fake_logits(4, seed=11)
IMAGES = images(LOGITS)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("triton")
    folder = template_repository(root / "repository", modes=("flag", "correct", "reject"))
    add_mode(folder, "digits_closed", "fides_validate_closed", mode="flag", on_error="closed")
    make_bundle(root / "bundle-7", n_classes=7)
    add_mode(folder, "digits_7", "fides_validate_7", mode="flag", bundle=str(root / "bundle-7"))
    return folder


@pytest.fixture(scope="module")
def server(repository: Path) -> Iterator[TritonServer]:
    with TritonServer(repository, explicit=True, auto_complete=False) as running:
        yield running


@pytest.fixture
def api(server: TritonServer) -> TritonApi:
    return server.api


def ask(server: TritonServer, protocol: str, model: str, array: NDArray[Any], attack: str = "") -> Any:
    """Ordinary client code; returns the client's result object."""
    module = tritonclient.http if protocol == "http" else tritonclient.grpc
    address = server.http_address if protocol == "http" else server.grpc_address
    with module.InferenceServerClient(address) as client:
        tensor = module.InferInput("image", list(array.shape), "FP32")
        tensor.set_data_from_numpy(array)
        parameters = {"attack": attack} if attack else None
        return client.infer(model, [tensor], parameters=parameters)


def statuses(outputs: dict[str, NDArray[Any]]) -> list[str]:
    return [s.decode() for s in outputs["FIDES_STATUS"].ravel()]


@pytest.mark.parametrize("protocol", ["http", "grpc"])
@pytest.mark.parametrize("attack", ["", "1,3"])
def test_observe_is_byte_for_byte_the_service(server: TritonServer, protocol: str, attack: str) -> None:
    bare = ask(server, protocol, "digits_base", IMAGES, attack).as_numpy("logits")
    protected = ask(server, protocol, "digits", IMAGES, attack)
    assert protected.as_numpy("logits").tobytes() == bare.tobytes()
    response = protected.get_response()
    outputs = response["outputs"] if protocol == "http" else response.outputs
    assert [o["name"] if protocol == "http" else o.name for o in outputs] == ["logits"]


def test_flag_marks_attacked_rows_and_leaves_the_answer(api: TritonApi) -> None:
    bare = api.infer("digits_base", {"image": IMAGES}, parameters={"attack": "1,3"})
    found = api.infer("digits_flag", {"image": IMAGES}, parameters={"attack": "1,3"})
    assert statuses(found) == ["trusted", "attacked", "trusted", "attacked"]
    assert found["logits"].tobytes() == bare["logits"].tobytes()
    assert found["FIDES_LABEL"].ravel().tolist() == LOGITS.argmax(axis=1).tolist()
    assert (found["FIDES_P_VALUE"].ravel() <= 0.01).tolist() == [False, True, False, True]
    assert b"false-alarm rate" in found["FIDES_REASON"][1, 0]
    assert found["FIDES_PROBABILITIES"].shape == (4, 10)


def test_correct_replaces_attacked_rows_and_keeps_the_kind(api: TritonApi) -> None:
    bare = api.infer("digits_base", {"image": IMAGES})
    found = api.infer("digits_correct", {"image": IMAGES}, parameters={"attack": "1,3"})
    assert found["logits"][[0, 2]].tobytes() == bare["logits"][[0, 2]].tobytes()
    corrected = softmax(found["logits"])[[1, 3]]
    np.testing.assert_allclose(corrected, softmax(LOGITS)[[1, 3]], atol=1e-4)
    assert found["logits"].argmax(axis=1).tolist() == LOGITS.argmax(axis=1).tolist()


def test_reject_refuses_the_request_with_attacked_rows_and_no_other(server: TritonServer, api: TritonApi) -> None:
    with pytest.raises(InferenceRefused, match=r"attacked: refused 2 of 4 row\(s\) \(1, 3\)") as refused:
        api.infer("digits_reject", {"image": IMAGES}, parameters={"attack": "1,3"})
    # 2.51's HTTP front end has no 409: every code of the python backend without its own mapping becomes 400.
    assert refused.value.status == 400
    with pytest.raises(tritonclient.grpc.InferenceServerException) as over_grpc:
        ask(server, "grpc", "digits_reject", IMAGES, "1,3")
    assert over_grpc.value.status() == "StatusCode.ALREADY_EXISTS"
    assert statuses(api.infer("digits_reject", {"image": IMAGES})) == ["trusted"] * 4


def test_the_verdict_is_the_one_of_the_pipeline_in_process(api: TritonApi, repository: Path) -> None:
    settings = Settings(bundle=str(repository / "fides_verify" / "bundle"), mode="flag")
    pipeline = Pipeline.from_settings(settings)
    served = api.infer("digits_base", {"image": IMAGES}, parameters={"attack": "2"})["logits"]
    verdict = pipeline.run(Query({"image": IMAGES}), Prediction.from_output(served, "logits"))
    found = api.infer("digits_flag", {"image": IMAGES}, parameters={"attack": "2"})
    assert statuses(found) == verdict.status_text.tolist()
    assert found["FIDES_SCORE"].ravel().tobytes() == verdict.score.tobytes()
    assert found["FIDES_PROBABILITIES"].tobytes() == verdict.probabilities.tobytes()
    assert found["FIDES_LABEL"].ravel().tolist() == verdict.label.tolist()


@pytest.mark.parametrize(
    ("case", "array", "match"),
    [
        ("shape", np.zeros((2, 1, 8, 9), np.float32), "unexpected shape"),
        ("dtype", np.zeros((2, 1, 8, 8), np.float64), "FP32"),
        ("rank", np.zeros((2, 64), np.float32), "unexpected shape"),
        ("too many rows", np.zeros((65, 1, 8, 8), np.float32), "batch"),
        ("no rows", np.zeros((0, 1, 8, 8), np.float32), "batch|shape|size"),
    ],
)
def test_bad_tensors_are_refused_and_the_server_goes_on(api: TritonApi, case: str, array: Any, match: str) -> None:
    with pytest.raises(InferenceRefused, match=match) as refused:
        api.infer("digits_flag", {"image": array})
    assert "Traceback" not in str(refused.value)
    assert "/" not in str(refused.value)
    assert statuses(api.infer("digits_flag", {"image": IMAGES})) == ["trusted"] * 4


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_rows_that_are_not_finite_are_errors_of_their_own_row(api: TritonApi, bad: float) -> None:
    array = IMAGES.copy()
    array[2, 0, 0, 0] = bad
    assert statuses(api.infer("digits_flag", {"image": array})) == ["trusted", "trusted", "error", "trusted"]
    with pytest.raises(InferenceRefused, match=r"error: refused 1 of 4 row\(s\) \(2\)") as refused:
        api.infer("digits_closed", {"image": array})
    assert refused.value.status == 503
    bare = api.infer("digits_base", {"image": array})["logits"]
    assert api.infer("digits", {"image": array})["logits"].tobytes() == bare.tobytes()


def test_another_number_of_classes_is_an_error_never_trust(api: TritonApi) -> None:
    found = api.infer("digits_7", {"image": IMAGES})
    assert statuses(found) == ["error"] * 4
    assert b"10 classes, the bundle has 7" in found["FIDES_REASON"][0, 0]


def test_a_bundle_changed_on_disk_is_refused_and_the_old_one_serves_on(api: TritonApi, repository: Path) -> None:
    file = repository / "fides_verify" / "bundle" / "detector.onnx"
    good = file.read_bytes()
    file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    try:
        for step in ("fides_validate", "fides_verify"):
            with pytest.raises(ServerError, match=r"detector\.onnx was changed.*fides fit"):
                api.reload(step)
        assert statuses(api.infer("digits__fides", {"image": IMAGES}, parameters={"attack": "0"}))[0] == "attacked"
    finally:
        file.write_bytes(good)
    api.reload("fides_validate")
    assert statuses(api.infer("digits__fides", {"image": IMAGES})) == ["trusted"] * 4


def test_requests_that_are_judged_together_keep_their_own_verdicts(api: TritonApi) -> None:
    bad = np.full_like(IMAGES[:1], np.nan)
    cases = [
        ({"image": IMAGES[:1]}, "", ["trusted"]),
        ({"image": IMAGES[1:3]}, "1", ["trusted", "attacked"]),
        ({"image": bad}, "", ["error"]),
        ({"image": IMAGES[3:]}, "all", ["attacked"]),
        ({"image": IMAGES}, "0,3", ["attacked", "trusted", "trusted", "attacked"]),
    ]

    def executions() -> tuple[int, int]:
        stats = api.exchange("GET", "/v2/models/fides_validate_flag/stats").json["model_stats"][0]
        return int(stats["execution_count"]), int(stats["inference_stats"]["success"]["count"])

    def one(number: int) -> bool:
        inputs, attack, expected = cases[number % len(cases)]
        found = api.infer("digits_flag", inputs, parameters={"attack": attack})
        return statuses(found) == expected and found["logits"].shape == (len(expected), 10)

    before = executions()
    with ThreadPoolExecutor(16) as pool:
        right = list(pool.map(one, range(400)))
    # Triton counts a request after it has sent the answer.
    wait_until(lambda: executions()[1] - before[1] >= 400, 10, "The last request's count")
    after = executions()
    assert all(right)
    # Fewer executions than requests: some were indeed judged together.
    assert after[0] - before[0] < after[1] - before[1] == 400


def test_metrics_carry_the_published_names(api: TritonApi) -> None:
    api.infer("digits_flag", {"image": IMAGES}, parameters={"attack": "0"})
    lines = (
        'fides_verdicts_total{model="digits_flag",status="attacked"}',
        'fides_verdicts_total{model="digits_flag",status="trusted"}',
        'fides_plugin_errors_total{model="digits_flag",plugin="verifier"} 0',
        'fides_score_bucket{model="digits_flag",le="0.01"}',
        'fides_stage_seconds_count{model="digits",stage="verify"}',
        'fides_stage_seconds_count{model="digits_flag",stage="detect"}',
        'fides_monitor_log_e_value{model="digits_flag"}',
        'fides_under_attack{model="digits_flag"}',
    )
    # Triton's endpoint takes new values over every half second or so.
    with contextlib.suppress(ServerError):
        wait_until(lambda: all(line in api.metrics() for line in lines), 10, "The metrics")
    text = api.metrics()
    for line in lines:
        assert line in text
