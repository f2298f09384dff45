"""Errors of the service and refusals of Triton itself: they reach the client, and the server stays up."""

from __future__ import annotations

import threading
from collections import Counter
from pathlib import Path

import pytest

from fides_plugins.serving.triton.api import InferenceRefused, TritonApi
from fides_plugins.serving.triton.attach import attach
from fides_plugins.serving.triton.plan import AttachOptions
from fides_plugins.serving.triton.server import TritonServer, is_available
from fides_plugins.testing import fake_logits
from tests.triton_models import image_bundle, images, stranger_repository

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
