"""Live endpoints as teachers: a real Triton and a real TorchServe, stopped half way."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fides_plugins.errors import TrainingError
from fides_plugins.launch.torchserve import TorchServeServer
from fides_plugins.launch.triton import TritonServer, is_available
from fides_plugins.onnx_model import OnnxModel
from fides_plugins.testing import fake_logits
from fides_plugins.training.service.teacher import CHUNK_ROWS
from fides_plugins.training.service.teachers import AnswerCache, load_teacher, output_kind
from fides_plugins.types import softmax
from tests.support.torchserve_models import WIDTH, plain_archive
from tests.support.triton_models import images, linear_image_onnx, stranger_repository

pytestmark = pytest.mark.integration


@pytest.mark.skipif(not is_available(), reason="no Triton server for this platform")
def test_triton_teaches_and_a_stop_half_way_loses_nothing(tmp_path: Path) -> None:
    repository = stranger_repository(tmp_path / "repository")
    x = images(fake_logits(3 * CHUNK_ROWS, seed=2))
    wanted = OnnxModel(linear_image_onnx("pixels_in", "scores", noise=0.002)).run({"pixels_in": x})["scores"]
    with TritonServer(repository, auto_complete=False) as server:
        teacher = load_teacher(f"grpc://{server.grpc_address}/flowers")
        assert teacher.input is not None
        assert (teacher.input.name, teacher.input.dtype) == ("pixels_in", "float32")
        assert teacher.input.shape == (None, 1, 8, 8)
        with pytest.raises(TrainingError, match=r"stopped answering.*kept"):
            AnswerCache(teacher, tmp_path / "cache").ask(x, lambda done: server.stop())
        teacher.close()
    with TritonServer(repository, auto_complete=False) as server:
        cache = AnswerCache(load_teacher(f"grpc://{server.grpc_address}/flowers"), tmp_path / "cache")
        assert np.allclose(cache.ask(x), wanted, atol=1e-4)
        assert (cache.remembered, cache.asked) == (CHUNK_ROWS, 2 * CHUNK_ROWS)
        cache.teacher.close()
        with pytest.raises(TrainingError, match="does not answer"):
            load_teacher(f"grpc://{server.grpc_address}/weeds")


def test_torchserve_teaches_and_a_stop_half_way_loses_nothing(tmp_path: Path) -> None:
    plain_archive(tmp_path)
    x = np.concatenate([fake_logits(2 * CHUNK_ROWS, seed=3), np.zeros((2 * CHUNK_ROWS, 1), np.float32)], axis=1)
    assert x.shape[1] == WIDTH
    wanted = softmax(x[:, :10] + 0.01)

    def cache(server: TorchServeServer) -> AnswerCache:
        url = f"{server.inference_url}/predictions/class"
        return AnswerCache(load_teacher(url, request_key="x", response_key="probabilities"), tmp_path / "cache")

    with (
        TorchServeServer(tmp_path, {"class": "class.mar"}) as server,
        pytest.raises(TrainingError, match=r"(stopped answering|status).*kept"),
    ):
        cache(server).ask(x, lambda done: server.stop())
    with TorchServeServer(tmp_path, {"class": "class.mar"}) as server:
        again = cache(server)
        found = again.ask(x)
        assert np.allclose(found, wanted, atol=1e-5)
        assert (again.remembered, again.asked) == (CHUNK_ROWS, CHUNK_ROWS)
        assert output_kind(found) == "probabilities"
        again.teacher.close()
