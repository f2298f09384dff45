"""Teachers of every kind, and the cache of their answers."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fides_plugins.errors import TrainingError
from fides_plugins.training.export import export_onnx
from fides_plugins.training.service.endpoints import TorchServeTeacher
from fides_plugins.training.service.teacher import CHUNK_ROWS, Teacher, class_matrix
from fides_plugins.training.service.teachers import (
    AnswerCache,
    OnnxTeacher,
    TorchTeacher,
    load_teacher,
    output_kind,
)
from fides_plugins.types import softmax

RNG = np.random.default_rng(0)
X = RNG.random((5, 4), dtype=np.float32)


def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 3)).eval()


def expected(x: np.ndarray = X) -> np.ndarray:
    with torch.no_grad():
        return np.asarray(network()(torch.from_numpy(x)).numpy())


def test_onnx_torch_and_torchscript_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m.onnx").write_bytes(export_onnx(network(), X, "pixels"))
    torch.jit.script(network()).save(str(tmp_path / "m.pt"))  # type: ignore[no-untyped-call]
    (tmp_path / "their_service.py").write_text(
        "import torch\n\ndef make():\n    torch.manual_seed(0)\n    return torch.nn.Sequential(torch.nn.Linear(4, 3))\n"
    )
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng(devices=[]):
        teachers = [load_teacher(s) for s in ("m.onnx", "m.pt", "their_service:make")]
    for teacher in teachers:
        assert np.allclose(teacher.ask(X), expected(), atol=1e-5)
        cost = teacher.cost(X)
        assert cost is not None
        assert (cost.parameters, cost.macs) == (15, 12)
        assert str(tmp_path) not in teacher.name
    assert teachers[0].input is not None
    assert teachers[0].input.name == "pixels"
    assert len({t.digest for t in teachers}) == 3


def test_digest_follows_the_weights() -> None:
    first, same, other = network(), network(), network()
    with torch.no_grad():
        other[0].bias.add_(1e-3)  # type: ignore[operator, union-attr, index]
    digests = [TorchTeacher(m, "m").digest for m in (first, same, other)]
    assert digests[0] == digests[1] != digests[2]


def test_fixed_batch_graph_answers_any_number() -> None:
    import onnx

    model = onnx.load_model_from_string(export_onnx(network(), X))
    for tensor in (*model.graph.input, *model.graph.output):
        tensor.type.tensor_type.shape.dim[0].dim_value = 2
    teacher = OnnxTeacher(model.SerializeToString())
    assert np.allclose(teacher.ask(X), expected(), atol=1e-5)


@pytest.mark.parametrize("spec", ["nothing", "grpc://", "missing.onnx", "grpc://127.0.0.1:1/model"])
def test_unusable_services_are_explained(spec: str) -> None:
    with pytest.raises(TrainingError):
        load_teacher(spec)


def test_wrong_images_are_explained() -> None:
    with pytest.raises(TrainingError, match="shape"):
        TorchTeacher(network(), "net").ask(np.zeros((2, 9), np.float32))
    with pytest.raises(TrainingError, match="expected Nx4"):
        OnnxTeacher(export_onnx(network(), X)).ask(np.zeros((2, 9), np.float32))


def test_answers_that_are_no_classes() -> None:
    with pytest.raises(TrainingError, match="one row of classes"):
        TorchTeacher(nn.Unflatten(1, (2, 2)), "net").ask(X)
    with pytest.raises(TrainingError, match="NaN"):
        TorchTeacher(nn.Identity(), "net").ask(np.full((2, 4), np.nan, np.float32))


class Counting(Teacher):
    """A local teacher that counts, and can stop."""

    def __init__(self, digest: str = "d", stop_after: int = 10**9, shift: float = 0.0) -> None:
        self.name, self.digest = "counting", digest
        self.rows, self.stop_after, self.shift = 0, stop_after, shift

    def answer(self, images: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        if self.rows + len(images) > self.stop_after:
            raise TrainingError("counting stopped answering.")
        self.rows += len(images)
        return expected(images) + np.float32(self.shift)


def test_interrupted_run_resumes_and_loses_nothing(tmp_path: Path) -> None:
    x = RNG.random((5 * CHUNK_ROWS + 7, 4), dtype=np.float32)
    first = Counting(stop_after=3 * CHUNK_ROWS)
    with pytest.raises(TrainingError, match="stopped answering"):
        AnswerCache(first, tmp_path).ask(x)
    second = Counting()
    cache = AnswerCache(second, tmp_path)
    seen: list[int] = []
    assert np.allclose(cache.ask(x, seen.append), expected(x), atol=1e-6)
    assert cache.remembered == 3 * CHUNK_ROWS
    assert cache.asked == 2 * CHUNK_ROWS + 7
    assert second.rows == cache.asked + 1  # one remembered row is asked again
    assert seen[-1] == len(x)
    assert not list(tmp_path.glob("*.part"))


def test_other_teacher_or_other_rows_are_not_confused(tmp_path: Path) -> None:
    AnswerCache(Counting("a"), tmp_path).ask(X)
    other = Counting("b", shift=1.0)
    assert np.allclose(AnswerCache(other, tmp_path).ask(X), expected() + 1)
    assert np.allclose(AnswerCache(Counting("a"), tmp_path).ask(X + 1), expected(X + 1), atol=1e-6)


def test_endpoint_that_serves_another_model_now_is_noticed(tmp_path: Path) -> None:
    AnswerCache(Counting(), tmp_path).ask(X)
    with pytest.raises(TrainingError, match="differently than when"):
        AnswerCache(Counting(shift=1.0), tmp_path).ask(X)


def test_damaged_cache_file_is_asked_again(tmp_path: Path) -> None:
    AnswerCache(Counting(), tmp_path).ask(X)
    (path,) = tmp_path.glob("*.npy")
    path.write_bytes(b"\x93NUMPY damaged")
    teacher = Counting()
    assert np.allclose(AnswerCache(teacher, tmp_path).ask(X), expected())
    assert teacher.rows == len(X)


@pytest.mark.parametrize("shape", [(7, 5), (7, 5, 1, 1), (7, 1, 5)])
def test_classes_may_lie_on_any_one_axis(shape: tuple[int, ...]) -> None:
    answer = RNG.normal(size=(7, 5)).astype(np.float32)
    np.testing.assert_array_equal(class_matrix(answer.reshape(shape), 7, "net"), answer)
    with pytest.raises(TrainingError, match="6 images with 7 rows"):
        class_matrix(answer.reshape(shape), 6, "net")


def test_output_kinds() -> None:
    logits = RNG.normal(size=(20, 5)).astype(np.float32)
    assert output_kind(logits) == "logits"
    assert output_kind(softmax(logits)) == "probabilities"
    assert output_kind(np.eye(3, dtype=np.float32)) == "probabilities"


class Answering(BaseHTTPRequestHandler):
    """A server that speaks as TorchServe does; `answer` makes the body of a response from a row."""

    fail_after = 10**9
    served = 0

    @staticmethod
    def answer(z: list[float]) -> Any:
        return z

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        cls = type(self)
        cls.served += 1
        if cls.served > cls.fail_after:
            self.send_error(503)
            return
        sent = json.loads(body)
        z = expected(np.array([sent["x"] if isinstance(sent, dict) else sent], np.float32))[0]
        content = json.dumps(cls.answer([float(v) for v in z])).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None: ...


@pytest.fixture
def server() -> Iterator[tuple[str, type[Answering]]]:
    handler = type("Handler", (Answering,), {})
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=httpd.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_port}/predictions/net", handler
    httpd.shutdown()
    thread.join()
    httpd.server_close()


@pytest.mark.parametrize("form", ["list", "nested", "object", "keyed", "chosen"])
def test_http_answers(server: tuple[str, type[Answering]], form: str) -> None:
    url, handler = server
    shapes = {
        "list": lambda z: z,
        "nested": lambda z: [z],
        "object": lambda z: {str(i): v for i, v in enumerate(z)},
        "keyed": lambda z: {"probabilities": z},
        "chosen": lambda z: {"label": 1, "probabilities": z},
    }
    handler.answer = staticmethod(shapes[form])  # type: ignore[method-assign]
    teacher = load_teacher(url, request_key="x", response_key="probabilities" if form == "chosen" else "")
    assert np.allclose(teacher.ask(X), expected(), atol=1e-5)
    assert teacher.cost(X) is None
    teacher.close()


def test_http_endpoint_that_stops_half_way(server: tuple[str, type[Answering]], tmp_path: Path) -> None:
    url, handler = server
    x = RNG.random((2 * CHUNK_ROWS, 4), dtype=np.float32)
    handler.fail_after = CHUNK_ROWS + 10
    with pytest.raises(TrainingError, match=r"status 503.*kept"):
        AnswerCache(TorchServeTeacher(url), tmp_path).ask(x)
    handler.fail_after = 10**9
    cache = AnswerCache(TorchServeTeacher(url), tmp_path)
    assert np.allclose(cache.ask(x), expected(x), atol=1e-5)
    assert cache.remembered == CHUNK_ROWS


def test_http_answer_that_is_none(server: tuple[str, type[Answering]]) -> None:
    url, handler = server
    handler.answer = staticmethod(lambda z: {"label": "cat", "score": 0.5})  # type: ignore[method-assign]
    with pytest.raises(TrainingError, match="no list of all class values"):
        TorchServeTeacher(url).ask(X)


def test_dead_http_endpoint() -> None:
    with pytest.raises(TrainingError, match="stopped answering"):
        TorchServeTeacher("http://127.0.0.1:1/predictions/net").ask(X)
