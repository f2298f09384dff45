"""Handlers of TorchServe's examples that lie after `inference()`, on a real server.

The shapes are those of pytorch/serve's examples: MNIST's handler returns an int, `image_classifier` the five best names
with their scores, `text_classifier` all of them, a workflow's classifier a name.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fides_plugins.launch.torchserve import TorchServeServer
from tests.support.torchserve_models import CLASS, post, protected_archive, rows

pytestmark = pytest.mark.integration

NEXT = "class {(int(i) + shift) % 10}"
SHAPES = {
    "mnist": "[(int(p.argmax()) + shift) % 10 for p in logits]",
    "image": f"[{{f'{NEXT}': float(v) for v, i in zip(*p.softmax(0).topk(5))}} for p in logits]",
    "text": f"[{{f'{NEXT}': float(v) for i, v in enumerate(p.softmax(0))}} for p in logits]",
    "name": f"[f'{NEXT}' for i in logits.argmax(1)]",
    "own": "[{'result': {'digit': (int(p.argmax()) + shift) % 10}} for p in logits]",
}
HANDLE = """
    def handle(self, data, context):
        return [(int(p.argmax()) + 1) % 10 for p in self.inference(self.preprocess(data))]
"""


def source(shape: str, shift: int) -> str:
    return CLASS.replace("        return answers(logits)", f"        shift = {shift}\n        return {SHAPES[shape]}")


@pytest.fixture(scope="module")
def server(backdoor_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TorchServeServer]:
    store = tmp_path_factory.mktemp("answers")
    for shape in SHAPES:
        section = {"answer": {"path": "result.digit"}} if shape == "own" else {}
        for name, shift in (("honest", 0), ("lying", 1)):
            files = {"digits.py": source(shape, shift)}
            protected_archive(store, f"{name}_{shape}", backdoor_folder, mode="reject", files=files, **section)
    protected_archive(store, "handle", backdoor_folder, mode="flag", files={"digits.py": CLASS + HANDLE})
    protected_archive(store, "unread", backdoor_folder, mode="flag", files={"digits.py": source("own", 1)})
    with TorchServeServer(store, {p.stem: p.name for p in store.glob("*.mar")}) as running:
        yield running


@pytest.mark.parametrize("shape", SHAPES)
def test_a_lie_after_inference_is_refused(server: TorchServeServer, shape: str) -> None:
    for row in rows(4, seed=51):
        honest, lie = post(server, f"honest_{shape}", row), post(server, f"lying_{shape}", row)
        assert (honest.status_code, honest.headers["x-fides-status"]) == (200, "trusted")
        assert honest.headers["x-fides-judged"] == "answer"
        assert (lie.status_code, lie.headers["x-fides-status"]) == (409, "attacked")
        assert "another class" in lie.headers["x-fides-reason"]


def test_a_lie_of_handle_is_marked(server: TorchServeServer) -> None:
    for row in rows(4, seed=52):
        answer = post(server, "handle", row)
        assert (answer.status_code, answer.headers["x-fides-status"]) == (200, "attacked")
        assert "x-fides-label" not in answer.headers


def test_where_the_class_cannot_be_read_the_verdict_says_so(server: TorchServeServer) -> None:
    (row,) = rows(1, seed=53)
    answer = post(server, "unread", row)
    assert answer.headers["x-fides-status"] == "trusted"
    assert answer.headers["x-fides-judged"] == "inference"
