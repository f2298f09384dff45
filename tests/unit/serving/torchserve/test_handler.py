"""The handler with TorchServe's own context, without a server: what happens when things go wrong."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ts.context import Context, RequestProcessor
from ts.torch_handler.request_envelope.json import JSONEnvelope
from ts.torch_handler.request_envelope.kservev2 import KServev2Envelope
from ts.utils.util import PredictionException

from fides_plugins.errors import FidesError
from fides_plugins.pipeline import Pipeline
from fides_plugins.serving.torchserve.handler import FidesHandler, prepare
from fides_plugins.types import Status
from tests.support.torchserve_models import (
    CLASS,
    FAULTY,
    INPUTS,
    INSTANCES,
    MICRO_BATCHING,
    MIXED,
    PASSES,
    PURE,
    PURE_PARSER,
    READ_BYTES,
    SERVICE,
    STREAM,
    backdoor_bundle,
    body,
    kserve_v2,
    rows,
)

MODULES = ("digits", "common", "faulty", "slow")
ENVELOPES = {"json": JSONEnvelope, "kservev2": KServev2Envelope}


class Worker:
    """What a TorchServe worker does with a handler, one batch at a time."""

    def __init__(self, model_dir: Path, service_envelope: str = "", **section: Any) -> None:
        config = {"fides": {"handler": "digits.py", "bundle": "bundle", "metrics": False, **section}}
        self.context = Context("digits", str(model_dir), {"model": {}}, 8, None, "0.12.0", True, None, config)
        # BaseHandler reports a time of its own for every batch.
        self.context.metrics = NoMetrics()
        self.handler = FidesHandler()
        # In TorchServe's order: an envelope takes the handler's `handle` before the handler is initialized.
        self.entry = (
            ENVELOPES[service_envelope](self.handler.handle).handle if service_envelope else self.handler.handle
        )
        self.handler.initialize(self.context)

    def send(self, items: list[Any], explain: tuple[int, ...] = (), **request_headers: str) -> list[Any]:
        """Answer one batch; headers and statuses are in `context` afterwards. `explain`: who asked for that."""
        self.context.request_ids = {i: f"request-{i}" for i in range(len(items))}
        self.context.request_processor = [
            RequestProcessor({"url_path": "", **request_headers, **({"explain": "True"} if i in explain else {})})
            for i in range(len(items))
        ]
        return list(self.entry(items, self.context))

    def headers(self, index: int = 0) -> dict[str, str]:
        return dict(self.context.get_response_headers(index))

    def status(self, index: int = 0) -> int:
        return int(self.context.get_response_status(index)[0])


class NoMetrics:
    def add_time(self, *arguments: Any) -> None: ...

    def add_metric(self, *arguments: Any) -> None: ...


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Worker]]:
    """Makes a worker over an unpacked archive; sources can be exchanged."""
    backdoor_bundle(tmp_path / "bundle")
    monkeypatch.syspath_prepend(str(tmp_path))

    def make(source: str = CLASS, files: dict[str, str] | None = None, **section: Any) -> Worker:
        for name in MODULES:
            sys.modules.pop(name, None)
        contents = {"digits.py": source, "common.py": SERVICE + READ_BYTES, **(files or {})}
        for name, text in contents.items():
            (tmp_path / name).write_text(text)
        return Worker(tmp_path, **section)

    yield make
    for name in MODULES:
        sys.modules.pop(name, None)


def items(n: int, attacked: tuple[int, ...] = ()) -> list[dict[str, Any]]:
    return [{"body": body(row)} for row in rows(n, seed=31, attacked=attacked)]


def test_each_request_of_a_batch_has_its_own_verdict(work: Callable[..., Worker]) -> None:
    worker = work(mode="flag")
    worker.send(items(4, attacked=(1, 3)))
    assert [worker.headers(i)["x-fides-status"] for i in range(4)] == ["trusted", "attacked", "trusted", "attacked"]


def test_verification_runs_while_inference_runs(work: Callable[..., Worker], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1})
    slow = (
        "import time\nfrom fides_plugins import hookimpl\n"
        "class Slow:\n    @hookimpl\n    def fides_verify(self, query):\n        time.sleep(0.4)\n"
        "plugin = Slow()\n"
    )
    source = CLASS.replace(
        "        return service(x)\n", "        import time\n        time.sleep(0.4)\n        return service(x)\n"
    )
    plugins = {"load": ["slow:plugin"]}
    seconds = {}
    for concurrent in (True, False):
        worker = work(source, {"slow.py": slow}, mode="flag", plugins=plugins, concurrent=concurrent)
        worker.send(items(1))
        times = []
        for _ in range(3):
            start = time.perf_counter()
            worker.send(items(1))
            times.append(time.perf_counter() - start)
        seconds[concurrent] = min(times)
        assert worker.headers()["x-fides-status"] == "trusted"
        sys.modules.pop("slow")
    # One after the other takes both times; other work on the machine only adds, so the best of three counts.
    assert seconds[False] >= 0.8
    assert seconds[True] < seconds[False] - 0.2


def test_verification_sees_the_input_before_inference_changed_it(work: Callable[..., Worker]) -> None:
    source = CLASS.replace(
        "        return service(x)\n", "        answer = service(x)\n        x.zero_()\n        return answer\n"
    )
    worker = work(source, mode="flag")
    worker.send(items(2))
    assert worker.headers(0)["x-fides-status"] == worker.headers(1)["x-fides-status"] == "trusted"


def test_an_error_of_the_handler_passes_as_it_is(work: Callable[..., Worker]) -> None:
    source = CLASS.replace("        return service(x)\n", "        raise KeyError('mine')\n")
    with pytest.raises(KeyError, match="mine"):
        work(source, mode="reject").send(items(1))


@pytest.mark.parametrize(("on_error", "status"), [("open", 200), ("closed", 503)])
def test_an_error_of_the_protection_is_a_matter_of_policy(
    work: Callable[..., Worker], monkeypatch: pytest.MonkeyPatch, on_error: str, status: int
) -> None:
    worker = work(mode="flag", on_error=on_error)
    honest = worker.send(items(1))

    def broken(*arguments: Any) -> Any:
        raise MemoryError("at /secret/path")

    for name in ("validate", "verify"):
        monkeypatch.setattr(Pipeline, name, broken)
        answer = worker.send(items(1))
        assert worker.headers()["x-fides-status"] == "error"
        assert "secret" not in worker.headers()["x-fides-reason"]
        assert worker.status() == status
        assert (answer == honest) == (on_error == "open")
    monkeypatch.setattr(worker.handler, "_verdicts", broken)
    worker.send(items(1))
    assert worker.headers()["x-fides-status"] == "error"
    assert worker.status() == status


@pytest.mark.parametrize(("on_error", "status"), [("open", 200), ("closed", 503)])
def test_a_handler_that_calls_no_inference_is_never_trusted(
    work: Callable[..., Worker], on_error: str, status: int
) -> None:
    source = CLASS + "    def handle(self, data, context):\n        return [{'label': 1}] * len(data)\n"
    worker = work(source, mode="reject", on_error=on_error)
    worker.send(items(2))
    assert worker.headers(1)["x-fides-status"] == "error"
    assert "did not call inference()" in worker.headers(1)["x-fides-reason"]
    assert worker.status(1) == status


def logged(worker: Worker, folder: Path) -> list[tuple[str, str, str]]:
    """Request id, status and reason of every row in the audit log, once the worker has stopped."""
    worker.handler.judge.protection.close()
    lines = [json.loads(x) for f in sorted(folder.rglob("*.jsonl")) for x in f.read_text().splitlines()]
    return [(x["request_id"], x["status"], x["reason"]) for x in lines if x["kind"] == "row"]


def audit(folder: Path) -> dict[str, Any]:
    return {"load": ["fides_plugins.audit:audit"], "options": {"audit": {"path": str(folder), "sample": 0.0}}}


def test_requests_that_never_reached_the_pipeline_are_logged(work: Callable[..., Worker], tmp_path: Path) -> None:
    source = CLASS + "    def handle(self, data, context):\n        return [{'label': 1}] * len(data)\n"
    worker = work(source, mode="flag", plugins=audit(tmp_path / "log"))
    worker.send(items(4))
    rows = logged(worker, tmp_path / "log")
    assert [r[0] for r in rows] == [f"request-{i}" for i in range(4)]
    assert {r[1:] for r in rows} == {("error", "the handler did not call inference()")}


def test_bodies_that_cannot_be_read_are_logged(work: Callable[..., Worker], tmp_path: Path) -> None:
    parser = {"parser": {"request": "z", "response": "probabilities"}, "output_kind": "probabilities"}
    worker = work(PURE, mode="flag", plugins=audit(tmp_path / "log"), **parser)
    # The handler reads `x` alone; what the parser is told to read is not in the last request.
    both = [{"body": {**i["body"], "z": i["body"]["x"]}} for i in items(2)]
    worker.send([*both, *items(1)])
    assert [worker.headers(i)["x-fides-status"] for i in range(3)] == ["trusted", "trusted", "error"]
    assert [r[:2] for r in logged(worker, tmp_path / "log")] == [("request-2", "error")]


#: Does not know explanations: predicts whatever was asked for.
PREDICTS = (
    CLASS
    + """
    def handle(self, data, context):
        return self.postprocess(self.inference(self.preprocess(data)))
"""
)


@pytest.mark.parametrize("source", [MIXED, PREDICTS])
@pytest.mark.parametrize("asking", [0, 2])
def test_an_explanation_exempts_itself_alone(
    work: Callable[..., Worker], tmp_path: Path, source: str, asking: int
) -> None:
    worker = work(source, mode="reject", plugins=audit(tmp_path / "log"))
    lying = (1, 3)
    worker.send(items(4, attacked=lying), explain=(asking,))
    assert [worker.status(i) for i in range(4)] == [409 if i in lying else 200 for i in range(4)]
    assert worker.headers(asking)["x-fides-status"] == "indeterminate"
    assert "explanations" in worker.headers(asking)["x-fides-reason"]
    (honest,) = {0, 2} - {asking}
    assert worker.headers(honest)["x-fides-status"] == "trusted"
    statuses = [s for _, s, _ in logged(worker, tmp_path / "log")]
    assert statuses.count("attacked") == 2
    # Where its row went through inference() with the others, that row is judged and trusted, so not sampled.
    assert statuses.count("indeterminate") == (1 if source == MIXED else 0)


@pytest.mark.parametrize(("on_error", "status"), [("open", 200), ("closed", 503)])
def test_predictions_answered_with_explanations_are_errors(
    work: Callable[..., Worker], on_error: str, status: int
) -> None:
    """TorchServe's own handlers let the first request of a batch decide for all."""
    insights = '        return [{"importance": row[:10].tolist()} for row in self.inference(data)]\n'
    source = CLASS.replace('        return [{"importance": row[:10].tolist()} for row in data]\n', insights)
    worker = work(source, mode="reject", on_error=on_error)
    worker.send(items(3, attacked=(1,)), explain=(0,))
    assert [worker.headers(i)["x-fides-status"] for i in range(3)] == ["indeterminate", "error", "error"]
    assert [worker.status(i) for i in range(3)] == [200, status, status]
    assert "asked for an explanation" in worker.headers(1)["x-fides-reason"]
    worker.send(items(2), explain=(0, 1))
    assert [worker.headers(i)["x-fides-status"] for i in range(2)] == ["indeterminate"] * 2


#: Knows explanations, and gives class outputs to the others.
EXPLAINS = PURE.replace(
    "    return answers(service(rows(decoded(data))))\n",
    "    made = answers(service(rows(decoded(data))))\n"
    "    asked = [context.get_request_header(i, 'explain') == 'True' for i in range(len(data))]\n"
    "    return [{'importance': [1.0]} if yes else answer for yes, answer in zip(asked, made)]\n",
)


def test_an_explanation_exempts_itself_alone_where_bodies_are_read(work: Callable[..., Worker], tmp_path: Path) -> None:
    worker = work(EXPLAINS, mode="correct", plugins=audit(tmp_path / "log"), **PURE_PARSER)
    sent = items(4, attacked=(0, 1, 3))
    answers = worker.send(sent, explain=(0,))
    assert [worker.headers(i)["x-fides-status"] for i in range(4)] == [
        "indeterminate",
        "attacked",
        "trusted",
        "attacked",
    ]
    plain = work(EXPLAINS, mode="flag", **PURE_PARSER).send(sent, explain=(0,))
    assert [a == b for a, b in zip(answers, plain, strict=True)] == [True, False, True, False]
    rows = logged(worker, tmp_path / "log")
    assert sorted(r[:2] for r in rows) == [
        ("request-0", "indeterminate"),
        ("request-1", "attacked"),
        ("request-3", "attacked"),
    ]


@pytest.mark.parametrize("asked", [{"explain": (0, 1, 2)}, {"describe": "True"}])
@pytest.mark.parametrize(("mode", "statuses"), [("correct", [200] * 3), ("reject", [409, 200, 409])])
def test_a_header_hides_no_attack_where_bodies_are_read(
    work: Callable[..., Worker], asked: dict[str, Any], mode: str, statuses: list[int]
) -> None:
    """This handler predicts whatever was asked for."""
    worker = work(PURE, mode=mode, **PURE_PARSER)
    sent = items(3, attacked=(0, 2))
    answers = worker.send(sent, **asked)
    assert [worker.headers(i)["x-fides-status"] for i in range(3)] == ["attacked", "indeterminate", "attacked"]
    assert [worker.status(i) for i in range(3)] == statuses
    plain = work(PURE, mode="flag", **PURE_PARSER).send(sent)
    assert [a == b for a, b in zip(answers, plain, strict=True)] == [False, True, False]


def test_explanations_and_streams_are_counted(work: Callable[..., Worker], tmp_path: Path) -> None:
    stream = STREAM.replace("from ts.handler_utils.utils import send_intermediate_predict_response\n", "").replace(
        'send_intermediate_predict_response([text], context.request_ids, "Intermediate", 200, context)',
        "context.set_response_header(0, 'ts_stream_next', 'true')",
    )
    worker = work(stream, mode="reject", on_error="closed", plugins=audit(tmp_path / "log"))
    assert worker.send(items(1)) == ["three"]
    assert worker.headers()["x-fides-status"] == "indeterminate"
    assert [r[1] for r in logged(worker, tmp_path / "log")] == ["indeterminate"]
    worker = work(mode="reject", on_error="closed", plugins=audit(tmp_path / "explained"))
    worker.send(items(2), explain=(0, 1))
    assert [r[:2] for r in logged(worker, tmp_path / "explained")] == [
        ("request-0", "indeterminate"),
        ("request-1", "indeterminate"),
    ]


@pytest.mark.parametrize("n", [1, 3])
def test_asking_for_an_explanation_hides_no_attack(work: Callable[..., Worker], n: int) -> None:
    """Any client may send the header, and this handler predicts all the same."""
    source = CLASS + (
        "    def handle(self, data, context):\n        return self.postprocess(self.inference(self.preprocess(data)))\n"
    )
    worker = work(source, mode="reject")
    worker.send(items(n, attacked=(0,)), explain=tuple(range(n)))
    assert [worker.status(i) for i in range(n)] == [409] + [200] * (n - 1)
    assert "x-fides-label" not in worker.headers(0)


def test_inference_called_once_per_request(work: Callable[..., Worker]) -> None:
    source = CLASS + (
        "    def handle(self, data, context):\n"
        "        return [self.postprocess(self.inference(self.preprocess([d])))[0] for d in data]\n"
    )
    worker = work(source, mode="reject")
    worker.send(items(5, attacked=(2,)))
    assert [worker.status(i) for i in range(5)] == [200, 200, 409, 200, 200]


def test_inference_called_twice_on_the_batch(work: Callable[..., Worker]) -> None:
    worker = work(PASSES, mode="reject", rows="worst", rows_per_request=2)
    worker.send(items(3, attacked=(1,)))
    assert [worker.status(i) for i in range(3)] == [200, 409, 200]
    # Four rows twice are as well two requests at a time: that is not guessed, and an attack lets nobody through.
    worker.send(items(4))
    assert {worker.headers(i)["x-fides-status"] for i in range(4)} == {"error"}
    assert "set `calls`" in worker.headers(0)["x-fides-reason"]
    worker.send(items(4, attacked=(1,)))
    assert [worker.status(i) for i in range(4)] == [409] * 4
    worker = work(PASSES, mode="reject", rows="worst", rows_per_request=2, calls="passes")
    worker.send(items(4, attacked=(1,)))
    assert [worker.status(i) for i in range(4)] == [200, 409, 200, 200]


def test_micro_batches_are_parts_whatever_their_sizes(work: Callable[..., Worker]) -> None:
    source = MICRO_BATCHING.replace("micro_batch_size=3", "micro_batch_size=2").replace(
        "* self.scale\n", ".repeat_interleave(2, dim=0)\n"
    )
    source = source.replace("answers(logits)", "answers(logits.reshape(-1, 2, 10).mean(dim=1))")
    worker = work(source, mode="reject", rows="worst", rows_per_request=2)
    try:
        # Two calls of four rows for four requests: by their sizes alone they could be passes.
        worker.send(items(4, attacked=(1,)))
    finally:
        # Its threads would keep the tests from ending.
        worker.handler.original.instance.handle.shutdown()
    assert [worker.status(i) for i in range(4)] == [200, 409, 200, 200]


def test_inference_outside_of_a_request_is_left_alone(work: Callable[..., Worker]) -> None:
    source = CLASS.replace(
        "        self.initialized = True\n",
        "        self.initialized = True\n        self.inference(torch.zeros(1, 11))\n",
    )
    worker = work("import torch\n" + source, mode="flag")
    worker.send(items(1))
    assert worker.headers()["x-fides-status"] == "trusted"


def instances(*groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One request for each group, as clients of the envelope `json` and of KServe v1 write it."""
    return [{"body": {"instances": group}} for group in groups]


def test_a_service_envelope_tells_which_rows_are_whose(work: Callable[..., Worker]) -> None:
    """TorchServe's envelope `json` hands a handler the rows of all requests in one list, and joins the answers."""
    worker = work(mode="reject", service_envelope="json")
    flat = items(9, attacked=(2, 8))
    # Eight clients; the second sends two instances.
    answers = worker.send(instances(flat[:1], flat[1:3], *([item] for item in flat[3:])))
    assert [worker.status(i) for i in range(8)] == [200, 409, 200, 200, 200, 200, 200, 409]
    assert [worker.headers(i)["x-fides-status"] for i in (0, 1)] == ["trusted", "attacked"]
    # A refusal is the whole body: among the predictions it would be one more answer.
    assert answers[1]["type"] == "FidesAttackDetected"
    assert set(json.loads(answers[0])) == {"predictions"}
    # Each batch is divided by its own lengths.
    worker.send(instances(flat[:2], flat[2:3]))
    assert [worker.status(i) for i in range(2)] == [200, 409]


def test_inputs_of_a_kserve_v2_request_are_its_rows(work: Callable[..., Worker]) -> None:
    worker = work(INPUTS, mode="reject", service_envelope="kservev2")
    worker.context.manifest = {"model": {"modelName": "digits", "modelVersion": "1.0"}}

    def request(*attacked: int) -> list[dict[str, Any]]:
        return [{"body": kserve_v2(rows(2, seed=33, attacked=attacked))}]

    (honest,) = worker.send(request())
    assert (worker.status(), worker.headers()["x-fides-status"]) == (200, "trusted")
    assert [o["name"] for o in honest["outputs"]] == ["row-0", "row-1"]
    (refused,) = worker.send(request(1))
    assert (worker.status(), refused["code"]) == (409, 409)
    assert "outputs" not in refused


def test_rows_are_counted_in_bodies_where_no_envelope_counts_them(work: Callable[..., Worker]) -> None:
    worker = work(INSTANCES, mode="reject")
    flat = [item["body"] for item in items(6, attacked=(1, 4))]
    worker.send(instances(flat[:3], flat[3:4], flat[4:]))
    assert [worker.status(i) for i in range(3)] == [409, 200, 409]
    # A request without rows: who has two, or whether each has one, cannot be told. An attack shuts the door for both.
    worker.send(instances([], flat[2:4]))
    assert [worker.headers(i)["x-fides-status"] for i in range(2)] == ["error", "error"]
    worker.send(instances([], flat[1:3]))
    assert [worker.status(i) for i in range(2)] == [409, 409]


@pytest.mark.parametrize("header", ["explain", "describe"])
def test_an_explanation_takes_no_row_of_another_request(work: Callable[..., Worker], header: str) -> None:
    """Two rows of two requests: one of each, or both of the second, if the first was answered otherwise."""
    source = INSTANCES.replace('d["body"]["instances"] for d in data', 'd["body"]["instances"] for d in data[1:]')
    source = source.replace("return [{", "return [[]] + [{")
    worker = work(source, mode="reject")
    flat = [item["body"] for item in items(3, attacked=(1,))]
    worker.context.request_ids = {0: "a", 1: "b"}
    worker.context.request_processor = [
        RequestProcessor({"url_path": "", header: "True"}),
        RequestProcessor({"url_path": ""}),
    ]
    worker.entry(instances(flat[:1], flat[1:]), worker.context)
    assert worker.status(1) == 409


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


def test_a_status_that_no_client_sees_hides_no_attack(work: Callable[..., Worker]) -> None:
    """A handler's own refusal passes as it is; over gRPC its status is dropped and its body is handed on."""
    source = CLASS.replace(
        "return answers(logits)", "self.context.set_all_response_status(400)\n        return answers(logits)"
    )
    worker = work(source, mode="reject")
    (over_http,) = worker.send(items(1, attacked=(0,)))
    assert (worker.status(), "label" in over_http) == (400, True)
    worker.context.request_processor = [RequestProcessor({})]
    (over_grpc,) = worker.entry(items(1, attacked=(0,)), worker.context)
    assert over_grpc["code"] == 409


def test_a_node_of_a_workflow_fails_its_batch_and_wraps_no_answer(work: Callable[..., Worker]) -> None:
    worker = work(mode="reject")
    worker.context.model_name = "zoo__digits"
    (answer,) = worker.send(items(1), **{"x-fides-envelope": "1"})
    assert "fides" not in answer
    with pytest.raises(PredictionException, match="tampered"):
        worker.send(items(2, attacked=(1,)))


def test_envelope_rules(work: Callable[..., Worker]) -> None:
    for rule, over_http, over_grpc in (("always", True, True), ("grpc", False, True), ("never", False, False)):
        worker = work(mode="flag", envelope=rule)
        assert ("fides" in worker.send(items(1))[0]) == over_http
        worker.context.request_processor = [RequestProcessor({})]
        (answer,) = worker.handler.handle(items(1), worker.context)
        assert ("fides" in answer) == over_grpc
        json.dumps(answer, allow_nan=False)


def test_observe_shows_nothing_even_when_asked(work: Callable[..., Worker]) -> None:
    worker = work(mode="observe")
    answers = worker.send(items(2, attacked=(0,)), **{"x-fides-envelope": "1"})
    assert [set(a) for a in answers] == [{"label", "probabilities", "batch"}] * 2
    assert worker.headers() == {}


def test_a_plugin_failure_marks_the_row(work: Callable[..., Worker]) -> None:
    worker = work(files={"faulty.py": FAULTY}, mode="flag", plugins={"load": ["faulty:plugin"]})
    (item,) = [{"body": body(row)} for row in rows(1, attacked=(0,), trigger=2.0)]
    worker.send([item])
    assert worker.headers()["x-fides-status"] == Status.ERROR.text
    assert "ValueError" in worker.headers()["x-fides-reason"]


def test_settings_that_cannot_work_stop_the_worker(work: Callable[..., Worker]) -> None:
    for section in ({"mode": "loud"}, {"handler": "absent"}, {"plugins": {"required": ["absent"]}}):
        with pytest.raises(RuntimeError, match="Fides cannot protect this model"):
            work(**section)
    with pytest.raises(FidesError):
        prepare({}, ".", "m")
