"""A TorchServe worker without a server: TorchServe's own context and envelopes around our handler."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ts.context import Context, RequestProcessor
from ts.torch_handler.request_envelope.json import JSONEnvelope
from ts.torch_handler.request_envelope.kservev2 import KServev2Envelope

from fides_plugins.serving.torchserve.handler import FidesHandler
from tests.support.torchserve_models import body, rows

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


def items(n: int, attacked: tuple[int, ...] = ()) -> list[dict[str, Any]]:
    return [{"body": body(row)} for row in rows(n, seed=31, attacked=attacked)]


def logged(worker: Worker, folder: Path) -> list[tuple[str, str, str]]:
    """Request id, status and reason of every row in the audit log, once the worker has stopped."""
    worker.handler.judge.protection.close()
    lines = [json.loads(x) for f in sorted(folder.rglob("*.jsonl")) for x in f.read_text().splitlines()]
    return [(x["request_id"], x["status"], x["reason"]) for x in lines if x["kind"] == "row"]


def audit(folder: Path) -> dict[str, Any]:
    return {"load": ["fides_plugins.audit:audit"], "options": {"audit": {"path": str(folder), "sample": 0.0}}}
