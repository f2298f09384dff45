"""A light client of Triton's HTTP API: health, control, metadata, one inference, metrics.

For control loops and checks only (`fides check`, `fides watch`, `fides attach --live`): it needs the
standard library and numpy, so that a liveness probe costs no import of an HTTP stack. Applications use
`tritonclient`.
"""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlsplit

from numpy.typing import NDArray

from fides_plugins import oip
from fides_plugins.errors import ServerError

#: Parameter whose value is the time of the last forced reload.
RELOAD_PARAMETER = "fides_step.reloaded"
#: What Triton answers to a load request when it is not in explicit mode, whether or not it polls its repository.
_NOT_EXPLICIT = "explicit model load / unload is not allowed"


@dataclass(frozen=True)
class Exchange:
    """Status code, body and headers of one HTTP exchange; names of headers are in lower case."""

    status: int
    body: bytes
    headers: Mapping[str, str]

    @property
    def json(self) -> dict[str, Any]:
        """The body as a JSON object; empty where it is none."""
        try:
            value = json.loads(self.body or b"{}")
        except ValueError:
            return {}
        return value if isinstance(value, dict) else {}

    @property
    def error(self) -> str:
        """The server's own words about what went wrong."""
        return oip.read_error(self.body) or self.body.decode(errors="replace")[:300]


@dataclass(frozen=True)
class Statistics:
    """Totals of one model: inferences that succeeded and failed, and their mean compute time in seconds."""

    succeeded: int
    failed: int
    mean_seconds: float


class InferenceRefused(ServerError):
    """The server answered an inference with an error status.

    Attributes
    ----------
    status, message:
        HTTP status code, and the server's words.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"The server answered {status}: {message}")
        self.status = status
        self.message = message


class Unreachable(ServerError):
    """The server gave no answer at all."""


class UnknownModel(ServerError):
    """The server's repository has no model of this name."""


class NotExplicit(ServerError):
    """The server does not run in explicit mode, so no step can be reloaded."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"{what} failed: the server is not in explicit mode, so none of its steps can be reloaded.",
            "Start it with --model-control-mode=explicit --load-model=*, or restart it where it is.",
        )


class TritonApi:
    """One server, by address.

    Parameters
    ----------
    address:
        `host:port` or `http://host:port` of Triton's HTTP endpoint.
    metrics_url:
        Address of the metrics, in the same forms or with a path; by default port 8002 of the same host.
    timeout_s:
        Time-out of one exchange, seconds.
    """

    def __init__(self, address: str, metrics_url: str = "", timeout_s: float = 10.0) -> None:
        self.host, self.port, _ = _parts(address, 8000)
        host, port, path = _parts(metrics_url, 8002) if metrics_url else (self.host, 8002, "")
        self.metrics_url = f"http://{f'[{host}]' if ':' in host else host}:{port}{path or '/metrics'}"
        self.timeout_s = timeout_s

    def exchange(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        headers: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> Exchange:
        """One HTTP exchange. Raises `OSError` when the server cannot be reached or does not answer."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=timeout_s or self.timeout_s)
        try:
            connection.request(method, path, body=body, headers=dict(headers or {}))
            response = connection.getresponse()
            return Exchange(response.status, response.read(), {k.lower(): v for k, v in response.getheaders()})
        except http.client.HTTPException as error:
            raise ConnectionError(str(error)) from error
        finally:
            connection.close()

    def _ask(self, method: str, path: str, what: str, body: bytes = b"", timeout_s: float | None = None) -> Exchange:
        try:
            answer = self.exchange(method, path, body, timeout_s=timeout_s)
        except OSError as error:
            raise Unreachable(
                f"Triton at {self.host}:{self.port} cannot be reached ({error.strerror or error}).",
                "Check the address and that the server runs.",
            ) from error
        if answer.status != 200:
            if _NOT_EXPLICIT in answer.error:
                raise NotExplicit(what)
            raise ServerError(f"{what} failed: {answer.error}")
        return answer

    def ready(self) -> bool:
        """Whether the server says it is ready. Raises `OSError` when it cannot be reached."""
        return self.exchange("GET", "/v2/health/ready").status == 200

    def server_name(self) -> str:
        """The server's own name (`--id`). Raises `OSError` when it cannot be reached."""
        return str(self.exchange("GET", "/v2").json.get("name", ""))

    def config(self, model: str) -> dict[str, Any]:
        """The model's full configuration as the server holds it, as protobuf JSON."""
        return self._ask("GET", f"/v2/models/{quote(model)}/config", f"Reading the config of {model!r}").json

    def index(self) -> list[dict[str, Any]]:
        """Models of the repository, with their states."""
        answer = self._ask("POST", "/v2/repository/index", "Reading the repository index")
        return list(json.loads(answer.body or b"[]"))

    def statistics(self, model: str) -> Statistics:
        """Counts of inferences of `model` since it was first loaded, over its versions."""
        stats = self._ask("GET", f"/v2/models/{quote(model)}/stats", f"Reading the statistics of {model!r}").json
        entries = [s["inference_stats"] for s in stats.get("model_stats", [])]
        succeeded = sum(int(e["success"]["count"]) for e in entries)
        return Statistics(
            succeeded,
            sum(int(e["fail"]["count"]) for e in entries),
            sum(int(e["compute_infer"]["ns"]) for e in entries) / max(succeeded, 1) / 1e9,
        )

    def load(self, model: str, config: Mapping[str, Any] | None = None, timeout_s: float = 60.0) -> None:
        """Load or reload a model (explicit mode only), optionally with another configuration.

        Raises
        ------
        NotExplicit
            If the server does not run in explicit mode.
        ServerError
            If the server refuses. The model it served before stays.
        """
        body = b"{}"
        if config is not None:
            body = json.dumps({"parameters": {"config": json.dumps(config)}}).encode()
        self._ask("POST", f"/v2/repository/models/{quote(model)}/load", f"Loading {model!r}", body, timeout_s)

    def reload(self, model: str, timeout_s: float = 60.0) -> None:
        """Restart the processes of `model` while the old ones go on serving (explicit mode only).

        Triton answers a plain load of a model whose files did not change with success and does nothing,
        even when its process is dead (measured on 2.51). A parameter that differs makes it load.
        """
        config = self.config(model)
        parameters = dict(config.get("parameters", {}))
        parameters[RELOAD_PARAMETER] = {"string_value": str(time.time_ns())}
        self.load(model, {**config, "parameters": parameters}, timeout_s)

    def unload(self, model: str) -> None:
        """Unload a model (explicit mode only)."""
        self._ask("POST", f"/v2/repository/models/{quote(model)}/unload", f"Unloading {model!r}", b"{}")

    def infer(
        self,
        model: str,
        inputs: Mapping[str, NDArray[Any]],
        outputs: Sequence[str] = (),
        *,
        parameters: Mapping[str, Any] | None = None,
        timeout_s: float | None = None,
    ) -> dict[str, NDArray[Any]]:
        """One inference over the binary protocol; `inputs`, `outputs` and `parameters` as for `oip.request_body`.

        Raises
        ------
        InferenceRefused
            If the server answers with an error.
        ServerError
            If its answer cannot be read.
        OSError
            If it cannot be reached or does not answer in time.
        """
        body, headers = oip.request_body(inputs, parameters=parameters, outputs=outputs)
        answer = self.exchange("POST", f"/v2/models/{quote(model)}/infer", body, headers, timeout_s)
        if answer.status != 200:
            raise InferenceRefused(answer.status, answer.error)
        return oip.read_answer(answer.body, answer.headers.get(oip.JSON_LENGTH.lower()))

    def metrics(self, timeout_s: float | None = None) -> str:
        """The metrics in Prometheus text format."""
        page = TritonApi(self.metrics_url, timeout_s=timeout_s or self.timeout_s)
        try:
            answer = page._ask("GET", urlsplit(self.metrics_url).path, "Reading the metrics")
        except ServerError as error:
            raise ServerError(
                f"The metrics at {self.metrics_url} cannot be read: {error.cause_text.rstrip('.')}.",
                "Give the address of Triton's metrics with --metrics HOST:PORT; without it, port 8002 is asked.",
            ) from error
        return answer.body.decode(errors="replace")


def _parts(address: str, default_port: int) -> tuple[str, int, str]:
    """Host, port and path of an address, with or without a scheme."""
    try:
        parts = urlsplit(address if "//" in address else f"//{address}")
        port = parts.port or default_port
    except ValueError as error:  # a port that is no number, or none that exists
        raise ServerError(f"{address!r} is no address: {error}.", "Write host:port.") from None
    if not parts.hostname or parts.scheme not in ("", "http"):
        raise ServerError(f"{address!r} is not the address of an HTTP server.", "Write host:port.")
    return parts.hostname, port, parts.path
