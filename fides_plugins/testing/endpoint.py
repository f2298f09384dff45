"""A small Open Inference Protocol server for tests: a real HTTP server over a Python function."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from fides_plugins import oip

if TYPE_CHECKING:
    from typing_extensions import Self

Predict = Callable[[Mapping[str, NDArray[Any]]], NDArray[Any]]


class OipServer:
    """Serves `predict(inputs) -> output` as model `model` on a free port; a context manager.

    An exception in `predict` becomes status 500, as a broken server would answer.

    Attributes
    ----------
    calls:
        Requests answered so far.

    Example
    -------
    >>> with OipServer(lambda inputs: inputs["pixels"]) as server:
    ...     server.url.startswith("http://127.0.0.1:")
    True
    """

    def __init__(self, predict: Predict, model: str = "model", output: str = "logits") -> None:
        self.calls = 0
        self.model = model
        self._predict = predict
        self._output = output
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    @property
    def url(self) -> str:
        """Address of the model."""
        return f"http://127.0.0.1:{self._server.server_port}/v2/models/{self.model}"

    def answer(self, body: bytes) -> bytes:
        """The protocol's answer to a request's body, both JSON without binary tensors."""
        inputs = oip.read_tensors(oip.read_json(body, "inputs"), "inputs")
        return oip.answer_body(self.model, {self._output: self._predict(inputs)})[0]

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                outer.calls += 1
                body = self.rfile.read(int(self.headers["Content-Length"]))
                try:
                    status, data = 200, outer.answer(body)
                except Exception as error:  # the function under test may raise anything; a server answers 500
                    status, data = 500, json.dumps({"error": type(error).__name__}).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *args: Any) -> None:
                """Tests have their own output."""

        return Handler
