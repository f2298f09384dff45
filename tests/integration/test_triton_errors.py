"""Errors of the service and refusals of Triton itself: they reach the client, and the server stays up."""

from __future__ import annotations

import json
import re
import threading
from collections import Counter
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fides_plugins.cli import app
from fides_plugins.errors import ServerError
from fides_plugins.launch.triton import TritonServer, is_available
from fides_plugins.serving.triton.attach import attach
from fides_plugins.serving.triton.operator.api import InferenceRefused, TritonApi
from fides_plugins.serving.triton.operator.check import check
from fides_plugins.serving.triton.plan import AttachOptions
from fides_plugins.testing import fake_logits
from tests.support.triton_models import STRANGER_CONFIG, image_bundle, images, stranger_repository

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(not is_available(), reason="no Triton server for this platform"),
]

PIXELS = images(fake_logits(1, seed=31))


def answers(api: TritonApi, model: str, clients: int, requests: int) -> Counter[str]:
    """What so many clients get for so many requests each."""
    counts: Counter[str] = Counter()
    lock = threading.Lock()

    def client() -> None:
        for _ in range(requests):
            try:
                api.infer(model, {"pixels_in": PIXELS}, timeout_s=20)
                answer = "good"
            except InferenceRefused as error:
                answer = f"{error.status} {error.message}"
            except OSError as error:
                answer = f"lost {type(error).__name__}"
            with lock:
                counts[answer] += 1
            if answer.startswith("lost"):
                return

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return counts


def test_a_service_that_answers_with_errors_does_not_end_the_server(tmp_path: Path) -> None:
    """Triton 2.51 crashes when the first of two parallel steps fails before the second is started.

    With the service as the first step, this load ended the server after some hundred requests.
    """
    repository = stranger_repository(tmp_path / "repository")
    for code in (repository / "flowers").glob("*/model.py"):
        # The warm-up request is all zeros and must pass.
        wrong = 'error=pb_utils.TritonError("no flower") if pixels.any() else None'
        code.write_text(
            code.read_text().replace(
                '[pb_utils.Tensor("scores", scores)]', f'[pb_utils.Tensor("scores", scores)], {wrong}'
            )
        )
    attach(repository, "flowers", AttachOptions(image_bundle(tmp_path / "bundle")))
    with TritonServer(repository, config_name="fides", auto_complete=False, grace_s=1.0) as server:
        counts = answers(server.api, "flowers", clients=8, requests=600)
        assert counts == {"500 in ensemble 'flowers', no flower": 4800}
        assert server.api.ready()


#: Both leave a protected model that answers: a queue that times out, and a full queue behind an ensemble of one step.
TIMES_OUT = (
    "dynamic_batching { max_queue_delay_microseconds: 100 default_queue_policy "
    "{ timeout_action: REJECT default_timeout_microseconds: 1000 } }\n"
)
FULL_QUEUE = "dynamic_batching { default_queue_policy { max_queue_size: 1 } }\n"
ONE_STEP = """\
platform: "ensemble"
max_batch_size: 16
input [ { name: "pixels_in" data_type: TYPE_FP32 dims: [ 1, 8, 8 ] } ]
output [ { name: "scores" data_type: TYPE_FP32 dims: [ 10 ] } ]
ensemble_scheduling { step [ {
  model_name: "flowers" model_version: 3
  input_map { key: "pixels_in" value: "pixels_in" } output_map { key: "scores" value: "scores" }
} ] }
"""


def _slow(batching: str) -> str:
    config = STRANGER_CONFIG.replace('string_value: "0"', 'string_value: "20"')
    return re.sub(r"dynamic_batching .*\n", batching, config)


def test_the_remedies_for_a_bounded_queue_keep_the_503_and_the_server(tmp_path: Path) -> None:
    repository = stranger_repository(tmp_path / "repository", _slow(FULL_QUEUE))
    roses = _slow(TIMES_OUT).replace('"flowers"', '"roses"')
    stranger_repository(repository, roses, model="roses")
    (repository / "front" / "1").mkdir(parents=True)
    (repository / "front" / "config.pbtxt").write_text(ONE_STEP)
    bundle = AttachOptions(image_bundle(tmp_path / "bundle"))
    with pytest.raises(ServerError, match="max_queue_size"):
        attach(repository, "flowers", bundle)
    attach(repository, "front", bundle)
    attach(repository, "roses", bundle)
    with TritonServer(repository, config_name="fides", auto_complete=False, grace_s=1.0) as server:
        for model, refused in (("front", "Exceeds maximum queue size"), ("roses", "Request timeout expired")):
            counts = answers(server.api, model, clients=8, requests=20)
            assert counts["good"] > 0, counts
            other = [answer for answer in counts if answer != "good"]
            assert other
            assert all(answer.startswith("503") and refused in answer for answer in other), counts
        assert server.api.ready()


def test_check_does_not_try_what_could_end_the_server(tmp_path: Path) -> None:
    repository = stranger_repository(tmp_path / "repository")
    attach(repository, "flowers", AttachOptions(image_bundle(tmp_path / "bundle")))
    base = repository / "flowers__base" / "config.pbtxt"
    # As if the limit had been added after attach.
    base.write_text(re.sub(r"dynamic_batching .*\n", "sequence_batching { }\n", base.read_text()))
    with TritonServer(repository, config_name="fides", auto_complete=False, grace_s=1.0) as server:
        bad = [f for f in check(server.api, "flowers") if not f.good]
        assert [f.what for f in bad] == ["service model"]
        assert "sequence_batching" in bad[0].detail
        assert server.api.ready()


def test_the_command_line_says_what_the_next_start_needs_and_that_detach_switches_nothing(tmp_path: Path) -> None:
    repository = stranger_repository(tmp_path / "repository")
    bundle = image_bundle(tmp_path / "bundle")
    run = CliRunner().invoke
    with TritonServer(repository, explicit=True, auto_complete=False, grace_s=1.0) as server:
        names = ["triton", str(repository), "flowers"]
        live = ["--live", server.http_address]
        attached = run(app, ["attach", *names, "--bundle", str(bundle), *live])
        assert attached.exit_code == 0, attached.output
        assert "Its next start needs: --model-config-name=fides" in attached.output
        detached = run(app, ["detach", *names])
        assert "A running server serves flowers protected until it is restarted" in detached.output
        again = run(app, ["attach", *names, "--bundle", str(bundle), *live])
        assert "already serves 'flowers' protected" in str(again.exception)
        assert "restart the server" in str(again.exception)
        assert "Restart a server" in str(run(app, ["detach", *names, *live]).exception)
    with TritonServer(repository, explicit=True, auto_complete=False, grace_s=1.0) as server:
        attached = run(app, ["attach", *names, "--bundle", str(bundle), "--live", server.http_address, "--json"])
        assert json.loads(attached.output)["flag"] == "--model-config-name=fides"
        detached = run(app, ["detach", *names, "--live", server.http_address])
        assert "The running server was switched back." in detached.output
