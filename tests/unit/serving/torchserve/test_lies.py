"""Handlers that lie after `inference()`, and how far an answer was judged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.torchserve_models import CLASS, PURE, PURE_PARSER
from tests.support.torchserve_worker import Worker, audit, items, logged

#: Answers honestly in `inference()` and says the next class to the client.
LIES = {
    "number": "return [(int(p.argmax()) + 1) % 10 for p in logits]",
    "name": "return [f'class {(int(p.argmax()) + 1) % 10}' for p in logits]",
    "top-k": "return [{f'class {(i + 1) % 10}': v for i, v in enumerate(p.softmax(0).tolist())} for p in logits]",
}


def lying(kind: str, honest: bool = False) -> str:
    source = CLASS.replace("return answers(logits)", LIES[kind].replace("+ 1", "+ 0") if honest else LIES[kind])
    return "import torch\n" + source


@pytest.mark.parametrize("kind", LIES)
@pytest.mark.parametrize(("mode", "status"), [("flag", 200), ("correct", 409), ("reject", 409)])
def test_a_lie_after_inference_is_attacked(
    work: Callable[..., Worker], tmp_path: Path, kind: str, mode: str, status: int
) -> None:
    worker = work(lying(kind), mode=mode, plugins=audit(tmp_path / "log"))
    answers = worker.send(items(2))
    for index in range(2):
        assert worker.headers(index)["x-fides-status"] == "attacked"
        assert worker.headers(index)["x-fides-judged"] == "answer"
        assert "another class" in worker.headers(index)["x-fides-reason"]
        assert "x-fides-label" not in worker.headers(index)
        assert worker.status(index) == status
        assert (isinstance(answers[index], dict) and "code" in answers[index]) == (status == 409)
    assert [r[:2] for r in logged(worker, tmp_path / "log")] == [("request-0", "attacked"), ("request-1", "attacked")]


@pytest.mark.parametrize("kind", LIES)
@pytest.mark.parametrize("mode", ["flag", "correct", "reject"])
def test_an_honest_answer_is_judged_to_its_end(work: Callable[..., Worker], kind: str, mode: str) -> None:
    worker = work(lying(kind, honest=True), mode=mode)
    worker.send(items(3, attacked=(1,)))
    seen = [(worker.headers(i)["x-fides-status"], worker.headers(i)["x-fides-judged"]) for i in range(3)]
    # What was corrected in inference() must come out of postprocess() corrected; other attacked rows are lies already.
    assert seen == [
        ("trusted", "answer"),
        ("attacked", "answer" if mode == "correct" else "inference"),
        ("trusted", "answer"),
    ]
    assert worker.status(1) == (409 if mode == "reject" else 200)


def test_a_lie_of_handle_itself_is_attacked(work: Callable[..., Worker]) -> None:
    source = CLASS + (
        "    def handle(self, data, context):\n"
        "        labels = self.inference(self.preprocess(data)).argmax(dim=1)\n"
        "        return [(int(i) + 1) % 10 for i in labels]\n"
    )
    worker = work(source, mode="reject")
    worker.send(items(2))
    assert [worker.status(i) for i in range(2)] == [409, 409]


def test_a_body_that_names_no_class_says_how_far_it_was_judged(work: Callable[..., Worker]) -> None:
    worker = work(mode="flag")
    worker.send(items(1))
    assert (worker.headers()["x-fides-status"], worker.headers()["x-fides-judged"]) == ("trusted", "inference")
    worker = work(mode="flag", envelope="always")
    assert worker.send(items(1))[0]["fides"]["judged"] == "inference"
    worker = work(PURE, mode="flag", **PURE_PARSER)
    worker.send(items(1))
    assert worker.headers()["x-fides-judged"] == "answer"


@pytest.mark.parametrize(("on_error", "status"), [("open", 200), ("closed", 503)])
def test_a_declared_path_must_hold_the_class(work: Callable[..., Worker], on_error: str, status: int) -> None:
    worker = work(mode="reject", answer={"path": "label"}, on_error=on_error)
    worker.send(items(2, attacked=(1,)))
    assert worker.headers(0)["x-fides-judged"] == "answer"
    assert [worker.status(i) for i in range(2)] == [200, 409]
    lie = CLASS.replace(
        "return answers(logits)", "return [{**a, 'label': (a['label'] + 1) % 10} for a in answers(logits)]"
    )
    worker = work(lie, mode="reject", answer={"path": "label"}, on_error=on_error)
    worker.send(items(1))
    assert worker.status() == 409
    worker = work(mode="reject", answer={"path": "result.label"}, on_error=on_error)
    worker.send(items(1))
    assert (worker.headers()["x-fides-status"], worker.status()) == ("error", status)
    worker = work(lying("number"), mode="reject", answer={"compare": False})
    worker.send(items(1))
    assert (worker.headers()["x-fides-judged"], worker.status()) == ("inference", 200)
