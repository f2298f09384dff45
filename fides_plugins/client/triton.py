"""Clients for Triton: the answer of an untrusted server, judged here.

`TritonClient` waits for each answer, `AsyncTritonClient` is for asyncio. The receipt reaches the client in one of two
ways. "host": the server passes the signed request on to the verifier (plug-in `remote`) and the receipt
back, as the output FIDES_RECEIPT. "verifier": the client asks the verifier itself, and the served model
needs no change at all.
"""

from __future__ import annotations

import importlib
import struct
from abc import abstractmethod
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

import httpx
import numpy as np
from numpy.typing import NDArray

from fides_plugins import oip
from fides_plugins.attestation.policy import EvidencePolicy
from fides_plugins.attestation.wire import PARAMETER, RECEIPT_OUTPUT
from fides_plugins.bundle import Bundle
from fides_plugins.client.calls import AsyncCalls, Calls, Client, Reply, printable
from fides_plugins.client.http import remaining
from fides_plugins.client.receipts import Brought, Pending
from fides_plugins.errors import InputError, ServerError
from fides_plugins.oip import first_text
from fides_plugins.types import Query

Protocol = Literal["http", "grpc"]
#: The tensors of an answer, and the answer as it came.
Outputs = tuple[dict[str, NDArray[Any]], Any]

#: Whether an address speaks TLS, by what stands before "://".
_TLS = {"": False, "http": False, "grpc": False, "https": True, "grpcs": True}
#: What tritonclient raises where a host's lengths, shapes and types do not fit together.
_UNREADABLE = (ValueError, TypeError, KeyError, IndexError, AttributeError, struct.error)


class _TritonBase(Client):
    """Configuration and message building of both Triton clients."""

    #: Which part of tritonclient's library holds the connection.
    _library_part = ""
    _no_commitment = "Triton answers service and verifier at once, so the host cannot commit to its output beforehand."

    def __init__(
        self,
        url: str,
        model: str,
        bundle: Bundle | str | Path,
        policy: EvidencePolicy,
        *,
        protocol: Protocol = "http",
        output: str = "",
        **client: Any,
    ) -> None:
        super().__init__(bundle, policy, **client)
        scheme, _, rest = url.rpartition("://")
        if scheme not in _TLS or not rest:
            raise InputError(f"{url!r} is no address of Triton.", "Give it as host:port, or https://host:port for TLS.")
        self.url = rest.rstrip("/")
        self._tls = _TLS[scheme]
        self._model_url = f"{'https' if self._tls else 'http'}://{self.url}/v2/models/{quote(model, safe='')}"
        self.model = model
        self.protocol: Protocol = protocol
        self._output = output or self.protection.settings.output
        self._connection: Any = None
        self._connection_bytes = 0

    def _connect(self, n_rows: int) -> Any:
        """tritonclient's connection, with room for an answer about so many rows."""
        if self._longest_answer(n_rows) > self._connection_bytes:
            # Rounded up, so that a few more rows need no new connection.
            self._connection_bytes = 1 << self._longest_answer(n_rows).bit_length()
            library = importlib.import_module(f"tritonclient.grpc{self._library_part}")
            # tritonclient's own bound on an answer is 2 GiB, and gRPC asks the proxy of the environment.
            channel = {
                "grpc.max_receive_message_length": self._connection_bytes,
                "grpc.max_send_message_length": -1,
                "grpc.enable_http_proxy": 0,
            }
            options = list(channel.items())
            self._connection = library.InferenceServerClient(self.url, ssl=self._tls, channel_args=options)
        return self._connection

    async def _service(self, query: Query, pending: Pending) -> Reply:
        if not self._output:
            self._output = self._choose_output(await self._metadata())
        names, parameters = [self._output], {}
        if self.receipt_from == "host":
            names, parameters = [self._output, RECEIPT_OUTPUT], {PARAMETER: pending.text}
        ask = self._ask_http if self.protocol == "http" else self._ask_grpc
        tensors, raw = await ask(query, names, parameters)
        if self._output not in tensors:
            raise ServerError(f"The model {self.model} gave no output {self._output!r}.", "Name its class output.")
        return Reply(tensors[self._output], Brought(first_text(tensors, RECEIPT_OUTPUT)), raw)

    async def _ask_http(self, query: Query, names: list[str], parameters: dict[str, str]) -> Outputs:
        body, headers = oip.request_body(query.inputs, parameters=parameters, outputs=names)
        call = {"method": "POST", "url": f"{self._model_url}/infer", "content": body, "headers": headers}
        reply = await self._http_ok(query.n_rows, **call)
        return oip.read_answer(reply.content, reply.headers.get(oip.JSON_LENGTH), names), reply

    async def _ask_grpc(self, query: Query, names: list[str], parameters: dict[str, str]) -> Outputs:
        library = importlib.import_module("tritonclient.grpc")
        inputs = [library.InferInput(n, list(a.shape), oip.oip_type(a.dtype)) for n, a in query.inputs.items()]
        for tensor, array in zip(inputs, query.inputs.values(), strict=True):
            tensor.set_data_from_numpy(np.ascontiguousarray(array))
        outputs = [library.InferRequestedOutput(name) for name in names]
        call = {"model_name": self.model, "inputs": inputs, "outputs": outputs, "parameters": parameters}
        result = await self._grpc_call("infer", query.n_rows, **call)
        return {name: found for name in names if (found := _tensor(result, name)) is not None}, result

    async def _metadata(self) -> Any:
        if self.protocol == "grpc":
            return await self._grpc_call("get_model_metadata", 1, model_name=self.model)
        reply = await self._http_ok(1, method="GET", url=self._model_url)
        try:
            return oip.read_json(reply.content, "outputs")
        except InputError:
            return None  # in another form

    async def _http_ok(self, n_rows: int, **call: Any) -> httpx.Response:
        try:
            reply = await self._http_call(n_rows, **call)
        except httpx.HTTPError as error:
            raise self._no_answer(error) from None
        if reply.status_code != 200:
            words = printable(oip.read_error(reply.content)) or f"status {reply.status_code}"
            raise ServerError(f"{self.model} at {self.url} gave no answer: {words}")
        return reply

    @abstractmethod
    async def _grpc_call(self, method: str, n_rows: int, **call: Any) -> Any:
        """A method of tritonclient's connection, with a time-out and one kind of error."""

    def _choose_output(self, metadata: Any) -> str:
        """The one output that is not part of our verdict, from the server's description of the model."""
        try:
            outputs = metadata["outputs"] if isinstance(metadata, dict) else metadata.outputs
            names = [str(o["name"] if isinstance(o, dict) else o.name) for o in outputs]
        except _UNREADABLE:
            raise ServerError(f"{self.url} describes {self.model} in another form than Triton's.") from None
        service = [n for n in names if not n.startswith("FIDES_")]
        if len(service) != 1:
            raise InputError(f"The model {self.model} has the outputs {service}.", "Name its class output as `output`.")
        return service[0]

    def _no_answer(self, error: Exception) -> ServerError:
        words = error.message() if hasattr(error, "message") and callable(error.message) else ""
        words = printable(str(words or type(error).__name__))
        return ServerError(f"{self.model} at {self.url} gave no answer: {words}")


class TritonClient(_TritonBase, Calls):
    """A client of one served model. Use one per thread, or the asynchronous one.

    Parameters
    ----------
    url:
        `host:port` of Triton; `https://host:port` or `grpcs://host:port` where it is reached by TLS.
    model:
        The served model; with `receipt_from="host"` one that has the output FIDES_RECEIPT.
    bundle, policy, verifier_url, evidence, identity, scheme, settings, roots, insecure_development:
        See `Client`.
    protocol:
        "http" or "grpc".
    receipt_from:
        "host" or "verifier": see the module.
    output:
        The class output; default: the only one.
    timeout_s:
        For one question: see `Client`.

    Example
    -------
    >>> client = TritonClient("localhost:8000", "digits__fides", "bundle", policy, verifier_url=...)  # doctest: +SKIP
    >>> client.infer({"image": images}).label                                                         # doctest: +SKIP
    """

    async def _grpc_call(self, method: str, n_rows: int, **call: Any) -> Any:
        try:
            return getattr(self._connect(n_rows), method)(client_timeout=remaining(self._timeout_s), **call)
        # tritonclient lets through errors of gRPC and protobuf besides its own, without a common base.
        except Exception as error:
            raise self._no_answer(error) from None

    def close(self) -> None:
        """Close the connections."""
        if self._connection is not None:
            self._connection.close()
        super().close()


class AsyncTritonClient(_TritonBase, AsyncCalls):
    """`TritonClient` for asyncio: many requests may be under way at once.

    Example
    -------
    >>> async with AsyncTritonClient("localhost:8001", "digits", "bundle", policy, protocol="grpc") as client:
    ...     verdict = await client.infer({"image": images})                                  # doctest: +SKIP
    """

    _library_part = ".aio"

    async def _grpc_call(self, method: str, n_rows: int, **call: Any) -> Any:
        try:
            return await getattr(self._connect(n_rows), method)(client_timeout=remaining(self._timeout_s), **call)
        # tritonclient lets through errors of gRPC and protobuf besides its own, without a common base.
        except Exception as error:
            raise self._no_answer(error) from None

    async def close(self) -> None:
        """Close the connections."""
        if self._connection is not None:
            await self._connection.close()
        await super().close()


def _tensor(result: Any, name: str) -> NDArray[Any] | None:
    try:
        tensor: NDArray[Any] | None = result.as_numpy(name)
    except _UNREADABLE:
        return None
    return tensor
