"""A host that lies: an HTTP proxy that sees every byte between two parties and may change it.

It stands in front of a real Triton, and between the plug-in `remote` and the verifier. A test sets
`on_request` and `on_response`; both get the outputs and inputs of the Open Inference Protocol taken apart, and
give them back as the host wants the other side to see them.
"""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Self

_LENGTH = "Inference-Header-Content-Length"
_NUMBERS = {"FP32": np.dtype("<f4"), "INT64": np.dtype("<i8"), "UINT8": np.dtype("u1")}


@dataclass
class Message:
    """One inference request or response, taken apart."""

    document: dict[str, Any]
    tensors: dict[str, NDArray[Any] | str] = field(default_factory=dict)

    @property
    def parameters(self) -> dict[str, Any]:
        return self.document.setdefault("parameters", {})

    @classmethod
    def parse(cls, body: bytes, length: str | None, part: str) -> Message:
        head = len(body) if length is None else int(length)
        document = json.loads(body[:head] or b"{}")
        message, position = cls(document), head
        for entry in document.get(part, []):
            size = entry.get("parameters", {}).get("binary_data_size")
            if size is None:
                data = entry.get("data")
                if data is None:
                    continue
                if entry["datatype"] == "BYTES":
                    message.tensors[entry["name"]] = data[0]
                else:
                    message.tensors[entry["name"]] = np.array(data, _NUMBERS[entry["datatype"]]).reshape(entry["shape"])
                continue
            raw = body[position : position + size]
            position += size
            if entry["datatype"] == "BYTES":
                message.tensors[entry["name"]] = raw[4 : 4 + int.from_bytes(raw[:4], "little")].decode("latin-1")
            else:
                array = np.frombuffer(raw, _NUMBERS[entry["datatype"]]).reshape(entry["shape"])
                message.tensors[entry["name"]] = array.copy()
        return message

    def render(self, part: str) -> tuple[bytes, str | None]:
        tail = b""
        for entry in self.document.get(part, []):
            value = self.tensors.get(entry["name"])
            if value is None:
                continue
            as_json = entry.pop("data", None) is not None
            if isinstance(value, str) and as_json:
                entry["data"] = [value]
                continue
            if isinstance(value, str):
                data = value.encode("latin-1")
                raw = len(data).to_bytes(4, "little") + data
                entry["shape"] = [1] * len(entry["shape"])
            else:
                raw = value.tobytes()
                entry["shape"] = list(value.shape)
            entry["parameters"] = {"binary_data_size": len(raw)}
            tail += raw
        self.document[part] = [e for e in self.document.get(part, []) if e["name"] in self.tensors or part == "inputs"]
        head = json.dumps(self.document).encode()
        return head + tail, str(len(head)) if tail else None


Hook = Callable[[Message], Message | None]


class LyingHost:
    """The proxy; a context manager.

    Attributes
    ----------
    url:
        `host:port` to talk to instead of the real server.
    target:
        `host:port` of the real server.
    on_request, on_response:
        Change what passes; None leaves it alone. Set them at any time.
    seen:
        Receipts that passed, oldest first.
    """

    def __init__(self, target: str) -> None:
        self.target = target
        self.on_request: Hook | None = None
        self.on_response: Hook | None = None
        self.evidence_from: str = ""
        self.seen: list[str] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.url = f"127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    def honest(self) -> None:
        """Stop lying."""
        self.on_request = self.on_response = None
        self.evidence_from = ""

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        host = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            # Without it the small writes of a reply wait for each other (Nagle).
            disable_nagle_algorithm = True

            def log_message(self, *arguments: Any) -> None:
                pass

            def do_GET(self) -> None:
                target = host.evidence_from if "/fides/evidence" in self.path and host.evidence_from else host.target
                self._forward("GET", b"", {}, target)

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                length = self.headers.get(_LENGTH)
                if host.on_request is not None:
                    message = host.on_request(Message.parse(body, length, "inputs"))
                    assert message is not None
                    body, length = message.render("inputs")
                self._forward("POST", body, {} if length is None else {_LENGTH: length}, host.target)

            def _forward(self, method: str, body: bytes, headers: dict[str, str], target: str) -> None:
                connection = http.client.HTTPConnection(target, timeout=30)
                connection.request(method, self.path, body=body, headers=headers)
                reply = connection.getresponse()
                data, length = reply.read(), reply.getheader(_LENGTH)
                connection.close()
                if method == "POST" and reply.status == 200:
                    message = Message.parse(data, length, "outputs")
                    receipt = message.tensors.get("FIDES_RECEIPT")
                    if isinstance(receipt, str) and receipt:
                        host.seen.append(receipt)
                    if host.on_response is not None:
                        changed = host.on_response(message)
                        assert changed is not None
                        data, length = changed.render("outputs")
                self.send_response(reply.status)
                self.send_header("Content-Type", reply.getheader("Content-Type", "application/octet-stream"))
                self.send_header("Content-Length", str(len(data)))
                if length is not None:
                    self.send_header(_LENGTH, length)
                self.end_headers()
                self.wfile.write(data)

        return Handler
