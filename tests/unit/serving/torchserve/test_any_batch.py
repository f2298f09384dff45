"""Whatever mix of row counts, bodies, envelopes and attacked rows a batch has: no attacked row reaches a client."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ts.context import Context, RequestProcessor
from ts.torch_handler.request_envelope.json import JSONEnvelope

from fides_plugins.serving.torchserve.handler import FidesHandler
from tests.support.torchserve_models import CLASS, READ_BYTES, SERVICE, backdoor_bundle, body, kserve_v2, rows
from tests.support.torchserve_worker import NoMetrics

#: Batches for each of the handlers below.
BATCHES = 700

#: Reads each form of a request that `FORMS` writes, and answers a list for each: in one call, or in one per request.
READER = (
    CLASS
    + """
    def handle(self, data, context):
        groups = [self.group(d["body"]) for d in data]
        logits = []
        for part in (groups if self.apart else [sum(groups, [])]):
            if part:
                logits += list(self.inference(torch.tensor(part)))
        made = iter(answers(torch.stack(logits)) if logits else [])
        return [{"predictions": [next(made) for _ in group]} for group in groups]

    def group(self, body):
        if isinstance(body, list):
            return body
        if "inputs" in body:
            return [i["data"] for i in body["inputs"]]
        return [r["x"] for r in body["instances"]] if "instances" in body else [body["x"]]
"""
).replace("class DigitHandler", "import torch\n\nclass DigitHandler")

FORMS = {
    "instances": lambda x: {"instances": [body(row) for row in x]},
    "list of lists": lambda x: x.tolist(),
    "KServe v2": kserve_v2,
    "one row, if there is one": lambda x: body(x[0]) if len(x) == 1 else {"instances": [body(row) for row in x]},
    "with a decoy": lambda x: {"instances": [body(row) for row in x], "other": [[1.0], [2.0]]},
}


class Served:
    """One handler as a worker runs it, and its answers to whole batches."""

    def __init__(self, folder: Path, mode: str, form: str) -> None:
        self.mode, self.form = mode, form
        section = {"handler": "digits.py", "bundle": "bundle", "metrics": False, "mode": mode}
        self.context = Context("digits", str(folder), {"model": {}}, 8, None, "0.12.0", True, None, {"fides": section})
        self.context.metrics = NoMetrics()
        handler = FidesHandler()
        self.entry = JSONEnvelope(handler.handle).handle if form == "envelope" else handler.handle
        handler.initialize(self.context)
        if form != "envelope":
            handler.original.instance.apart = form == "one call per request"

    def send(self, bodies: list[Any], headers: list[dict[str, str]]) -> list[Any]:
        self.context.request_ids = {i: f"request-{i}" for i in range(len(bodies))}
        self.context.request_processor = [RequestProcessor({"url_path": "", **h}) for h in headers]
        return list(self.entry([{"body": b} for b in bodies], self.context))

    def status(self, index: int) -> int:
        return int(self.context.get_response_status(index)[0])


@pytest.fixture(
    scope="module", params=itertools.product(["reject", "correct"], ["envelope", "one call", "one call per request"])
)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    mode, form = request.param
    folder = tmp_path_factory.mktemp("served")
    backdoor_bundle(folder / "bundle")
    (folder / "digits.py").write_text(CLASS if form == "envelope" else READER)
    (folder / "common.py").write_text(SERVICE + READ_BYTES)
    sys.path.insert(0, str(folder))
    yield Served(folder, mode, form)
    sys.path.remove(str(folder))
    for name in ("digits", "common"):
        sys.modules.pop(name, None)


client = st.tuples(
    st.lists(st.booleans(), max_size=4),
    st.sampled_from(sorted(FORMS)),
    st.sampled_from(["", "", "", "explain", "describe"]),
)


@settings(max_examples=BATCHES, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(client, min_size=1, max_size=8), st.integers(0, 2**31))
def test_no_attacked_row_reaches_a_client(served: Served, clients: list[Any], seed: int) -> None:
    if served.form == "envelope":
        # TorchServe's envelope fails on a request without instances, and its handler here knows explanations.
        clients = [(lies or [False], "instances", "") for lies, _, _ in clients]
    total = sum(len(lies) for lies, _, _ in clients)
    x = rows(max(total, 1), seed=seed % 997)
    x[:total, 10] = [lie for lies, _, _ in clients for lie in lies]
    groups = np.split(x[:total], np.cumsum([len(lies) for lies, _, _ in clients])[:-1])
    if served.form == "envelope":
        bodies = [{"instances": [{"body": body(row)} for row in group]} for group in groups]
    else:
        bodies = [FORMS[form](group) for group, (_, form, _) in zip(groups, clients, strict=True)]
    answers = served.send(bodies, [{h: "True"} if h else {} for _, _, h in clients])
    attacked = any(any(lies) for lies, _, _ in clients)
    for index, (group, (lies, _, _)) in enumerate(zip(groups, clients, strict=True)):
        if served.mode == "reject" and any(lies):
            assert served.status(index) == 409
        if not attacked:
            assert served.status(index) == 200
        if served.status(index) == 200:
            answer = answers[index] if isinstance(answers[index], dict) else json.loads(answers[index])
            assert [p["label"] for p in answer["predictions"]] == [int(row[:10].argmax()) for row in group]
