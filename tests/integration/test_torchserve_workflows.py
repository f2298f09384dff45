"""Workflows on a real TorchServe: a refusal ends the workflow, wherever in it the protected model stands."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest

from fides_plugins.errors import InputError
from fides_plugins.launch.torchserve import TorchServeServer
from fides_plugins.serving.torchserve.attach import attach
from tests.support.torchserve_models import CLASS, body, protected_archive, rows

pytestmark = pytest.mark.integration

#: In the shape of TorchServe's example: functions before and after a classifier that answers with a name.
FUNCTIONS = """
import json

def before(data, context):
    return None if data is None else [d.get("data") or d.get("body") for d in data]

def after(data, context):
    # Like the breed classifier of the example, it has an answer for whatever is not a name that it looks for.
    return None if data is None else ["It's a " + bytes(d.get("body")).decode().replace("class 7", "dog") for d in data]
"""
NAMES = "return [f'class {int(i)}' for i in logits.argmax(dim=1)]"
#: Leaves out what it cannot read, and answers for it without asking the model.
DROPS = """
    def handle(self, data, context):
        known = [d["x"][0] != 99.0 for d in map(self.read, data)]
        logits = self.inference(self.preprocess([d for d, yes in zip(data, known) if yes]))
        made = iter(self.postprocess(logits))
        return [next(made) if yes else "nothing" for yes in known]

    def read(self, item):
        return decoded([item])[0]["body"]
"""


def workflow(store: Path, name: str, node: str, dag: dict[str, list[str]], batch: int = 1) -> None:
    """A workflow archive as torch-workflow-archiver writes it."""
    defaults = {"min-workers": 1, "max-workers": 1, "batch-size": batch, "max-batch-delay": 300, "retry-attempts": 1}
    spec = {"models": {**defaults, "timeout-ms": 10000, "classify": {"url": f"{node}.mar"}}, "dag": dag}
    entry = {"workflowName": name, "specFile": "spec.yaml", "handler": "functions.py"}
    manifest = {"createdOn": "1", "archiverVersion": "0.2.15", "workflow": entry}
    with zipfile.ZipFile(store / f"{name}.war", "w") as out:
        out.writestr("WAR-INF/MANIFEST.json", json.dumps(manifest))
        out.writestr("spec.yaml", json.dumps(spec))
        out.writestr("functions.py", FUNCTIONS)


@pytest.fixture(scope="module")
def server(backdoor_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TorchServeServer]:
    store = tmp_path_factory.mktemp("store")
    named = CLASS.replace("return answers(logits)", NAMES)
    for mode in ("flag", "correct", "reject"):
        protected_archive(store, mode, backdoor_folder, mode=mode, files={"digits.py": named})
        workflow(store, f"middle_{mode}", mode, {"before": ["classify"], "classify": ["after"]})
    workflow(store, "end", "reject", {"before": ["classify"]})
    protected_archive(store, "drops", backdoor_folder, mode="reject", files={"digits.py": named + DROPS})
    workflow(store, "dropping", "drops", {"before": ["classify"], "classify": ["after"]}, batch=4)
    with TorchServeServer(store, {"reject": "reject.mar"}, properties={"workflow_store": str(store)}) as running:
        for archive in sorted(store.glob("*.war")):
            url = f"{running.management_url}/workflows?url={archive.name}&synchronous=true"
            assert httpx.post(url, timeout=120).status_code == 200
        yield running


def ask(server: TorchServeServer, name: str, row: np.ndarray) -> httpx.Response:
    return httpx.post(f"{server.inference_url}/wfpredict/{name}", json=body(row), timeout=30)


def honest(row: np.ndarray, prefix: str = "It's a ") -> str:
    return (prefix + f"class {int(row[:10].argmax())}").replace("class 7", "dog" if prefix else "class 7")


@pytest.mark.parametrize(("name", "prefix"), [("middle_reject", "It's a "), ("end", "")])
def test_a_refusal_ends_the_workflow(server: TorchServeServer, name: str, prefix: str) -> None:
    """It became the next node's input, or the workflow's answer, with status 200."""
    for index, row in enumerate(rows(6, seed=61, attacked=(1, 4))):
        answer = ask(server, name, row)
        if index in (1, 4):
            assert answer.status_code == 500
            assert "It's a" not in answer.text
        else:
            assert (answer.status_code, answer.text) == (200, honest(row, prefix))


def test_the_next_node_gets_what_was_corrected(server: TorchServeServer) -> None:
    for row in rows(6, seed=62, attacked=(1, 4)):
        answer = ask(server, "middle_correct", row)
        assert (answer.status_code, answer.text) == (200, honest(row))


def test_a_flag_does_not_reach_the_client(server: TorchServeServer) -> None:
    """A workflow hands on bodies alone, which the how-to says."""
    (row,) = rows(1, seed=63, attacked=(0,))
    answer = ask(server, "middle_flag", row)
    assert answer.status_code == 200
    assert not [h for h in answer.headers if h.startswith("x-fides")]


def test_nodes_that_leave_rows_out_let_no_lie_through(server: TorchServeServer) -> None:
    wrong = 0
    for round_ in range(5):
        x = rows(4, seed=640 + round_, attacked=(0, 2))
        x[1, 0] = 99.0
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda row: ask(server, "dropping", row), x))
        for row, answer in zip(x, answers, strict=True):
            wrong += answer.status_code == 200 and answer.text not in (honest(row), "It's a nothing")
    assert wrong == 0


def test_outside_of_a_workflow_a_refusal_concerns_one_request(server: TorchServeServer) -> None:
    (row,) = rows(1, seed=65, attacked=(0,))
    answer = httpx.post(f"{server.inference_url}/predictions/reject", json=body(row), timeout=30)
    assert (answer.status_code, answer.json()["type"]) == (409, "FidesAttackDetected")


def test_a_workflow_archive_is_refused_with_what_to_do(backdoor_folder: Path, tmp_path: Path) -> None:
    workflow(tmp_path, "zoo", "classify", {"before": ["classify"]})
    with pytest.raises(InputError, match=r"zoo\.war is a workflow.*each of its models that classifies"):
        attach(tmp_path / "zoo.war", backdoor_folder, tmp_path / "out.war")
    assert not (tmp_path / "out.war").exists()
