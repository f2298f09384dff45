"""Clients for Triton: the answer of an untrusted server, judged here.

`TritonClient` and `AsyncTritonClient` differ in waiting only. The receipt reaches the client in one of two
ways. "host": the server passes the signed request on to the verifier (plug-in `remote`) and the receipt
back, as the output FIDES_RECEIPT. "verifier": the client asks the verifier itself, and the served model
needs no change at all.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fides_plugins.attestation.policy import EvidencePolicy
from fides_plugins.attestation.tensors import oip_type
from fides_plugins.attestation.wire import COMMITMENT_PARAMETER, PARAMETER, RECEIPT_OUTPUT
from fides_plugins.bundle import Bundle
from fides_plugins.client.calls import AsyncCalls, Calls, Client, ReceiptFrom
from fides_plugins.client.core import Reply
from fides_plugins.client.judge import Answer
from fides_plugins.client.receipts import Pending
from fides_plugins.errors import InputError, ServerError

Protocol = Literal["http", "grpc"]

#: What tritonclient raises where a host's lengths, shapes and types do not fit together.
_UNREADABLE = (ValueError, TypeError, KeyError, IndexError, AttributeError, struct.error)


class _TritonBase(Client):
    """Configuration and message building of both Triton clients."""

    _no_commitment = "Triton answers service and verifier at once, so the host cannot commit to its output beforehand."

    def __init__(
        self,
        url: str,
        model: str,
        bundle: Bundle | str | Path,
        policy: EvidencePolicy,
        *,
        protocol: Protocol = "http",
        receipt_from: ReceiptFrom = "host",
        output: str = "",
        verifier_url: str = "",
        timeout_s: float = 10.0,
        **core: Any,
    ) -> None:
        super().__init__(
            bundle, policy, receipt_from=receipt_from, verifier_url=verifier_url, timeout_s=timeout_s, **core
        )
        self.url = url.removeprefix("http://").removeprefix("grpc://").rstrip("/")
        self.model = model
        self.protocol: Protocol = protocol
        self._output = output or self.core.judge.settings.output
        self._verifier_url = verifier_url.removeprefix("http://").rstrip("/")
        self._verifier_model = self.core.judge.bundle.manifest.name
        self._connections: dict[str, Any] = {}

    def _library(self, protocol: Protocol) -> Any:
        if protocol == "grpc":
            import tritonclient.grpc as library
        else:
            import tritonclient.http as library
        return library

    def _tensors(self, protocol: Protocol, inputs: Mapping[str, NDArray[Any]]) -> list[Any]:
        library = self._library(protocol)
        tensors = []
        for name, array in inputs.items():
            tensor = library.InferInput(name, list(array.shape), oip_type(array.dtype))
            tensor.set_data_from_numpy(np.ascontiguousarray(array))
            tensors.append(tensor)
        return tensors

    def _wanted(self) -> list[str]:
        return [self._output, RECEIPT_OUTPUT] if self.receipt_from == "host" else [self._output]

    def _service_call(self, inputs: Mapping[str, NDArray[Any]], pending: Pending) -> dict[str, Any]:
        library = self._library(self.protocol)
        call: dict[str, Any] = {
            "model_name": self.model,
            "inputs": self._tensors(self.protocol, inputs),
            "outputs": [library.InferRequestedOutput(name) for name in self._wanted()],
        }
        if self.receipt_from == "host":
            call["parameters"] = {PARAMETER: pending.text}
        return call

    def _verifier_call(self, tensor: NDArray[Any], pending: Pending, output: NDArray[Any] | None) -> dict[str, Any]:
        spec = self.core.judge.bundle.manifest.input
        parameters = {PARAMETER: pending.text}
        if output is not None:
            parameters[COMMITMENT_PARAMETER] = self.core.checker.commitment(output)
        return {
            "model_name": self._verifier_model,
            "inputs": self._tensors("http", {spec.name if spec is not None else "input": tensor}),
            "outputs": [self._library("http").InferRequestedOutput(RECEIPT_OUTPUT)],
            "parameters": parameters,
        }

    def _reply(self, result: Any) -> Reply:
        try:
            output = result.as_numpy(self._output)
        except _UNREADABLE:
            output = None
        if output is None:
            raise ServerError(f"The model {self.model} gave no output {self._output!r}.", "Name its class output.")
        return Reply(output, receipt_text(result) if self.receipt_from == "host" else None, result)

    def _choose_output(self, metadata: Any) -> str:
        """The one output that is no verdict of ours, from the server's description of the model."""
        outputs = metadata["outputs"] if isinstance(metadata, dict) else metadata.outputs
        names = [o["name"] if isinstance(o, dict) else o.name for o in outputs]
        service = [n for n in names if not n.startswith("FIDES_")]
        if len(service) != 1:
            raise InputError(f"The model {self.model} has the outputs {service}.", "Name its class output as `output`.")
        return str(service[0])


class TritonClient(_TritonBase, Calls):
    """A client of one served model. Use one per thread, or the asynchronous one.

    Parameters
    ----------
    url:
        `host:port` of Triton.
    model:
        The served model; with `receipt_from="host"` one that has the output FIDES_RECEIPT.
    bundle, policy, verifier_url, evidence, identity, scheme, settings, roots, insecure_development:
        See `ClientCore`.
    protocol:
        "http" or "grpc".
    receipt_from:
        "host" or "verifier": see the module.
    output:
        The class output; default: the only one.
    timeout_s:
        For each network operation.

    Example
    -------
    >>> client = TritonClient("localhost:8000", "digits__fides", "bundle", policy, verifier_url=...)  # doctest: +SKIP
    >>> client.infer({"image": images}).label                                                         # doctest: +SKIP
    """

    def _once(self, inputs: Mapping[str, NDArray[Any]]) -> Answer:
        query, tensor = self.core.prepare(inputs)
        pending = self.core.checker.begin(tensor)
        if not self._output:
            self._output = self._choose_output(self._connect(self.url, self.protocol).get_model_metadata(self.model))
        reply = self._reply(self._infer(self.url, self.protocol, self._service_call(query.inputs, pending)))
        if self.receipt_from == "verifier":
            committed = reply.output if self.core.checker.scheme == "commitment" else None
            call = self._verifier_call(tensor, pending, committed)
            try:
                receipt = receipt_text(self._infer(self._verifier_url, "http", call))
            except ServerError:
                receipt = None  # whoever keeps the verifier from answering gets no better verdict for it
            reply = Reply(reply.output, receipt, reply.raw)
        return self.core.finish(query, pending, reply)

    def _connect(self, url: str, protocol: Protocol) -> Any:
        key = f"{protocol}://{url}"
        if key not in self._connections:
            library = self._library(protocol)
            options = (
                {}
                if protocol == "grpc"
                else {"network_timeout": self._timeout_s, "connection_timeout": self._timeout_s}
            )
            self._connections[key] = library.InferenceServerClient(url, **options)
        return self._connections[key]

    def _infer(self, url: str, protocol: Protocol, call: dict[str, Any]) -> Any:
        options = {"client_timeout": self._timeout_s} if protocol == "grpc" else {}
        try:
            return self._connect(url, protocol).infer(**call, **options)
        # tritonclient lets through errors of gevent, gRPC and sockets besides its own, without a common base.
        except Exception as error:
            raise ServerError(f"{call['model_name']} at {url} gave no answer: {_message(error)}") from None

    def close(self) -> None:
        """Close the connections."""
        for connection in self._connections.values():
            connection.close()
        self._connections.clear()
        self.core.judge.close()


class AsyncTritonClient(_TritonBase, AsyncCalls):
    """`TritonClient` for asyncio: many requests may be under way at once.

    Example
    -------
    >>> async with AsyncTritonClient("localhost:8001", "digits", "bundle", policy, protocol="grpc") as client:
    ...     verdict = await client.infer({"image": images})                                  # doctest: +SKIP
    """

    async def _once(self, inputs: Mapping[str, NDArray[Any]]) -> Answer:
        query, tensor = self.core.prepare(inputs)
        # Fetching and checking evidence blocks, so it happens in a thread; it is rare.
        pending = await asyncio.to_thread(self.core.checker.begin, tensor)
        if not self._output:
            connection = self._connect(self.url, self.protocol)
            self._output = self._choose_output(await connection.get_model_metadata(self.model))
        service = self._infer(self.url, self.protocol, self._service_call(query.inputs, pending))
        if self.receipt_from == "host":
            return self.core.finish(query, pending, self._reply(await service))
        if self.core.checker.scheme == "commitment":
            reply = self._reply(await service)
            receipt = await self._receipt(self._verifier_call(tensor, pending, reply.output))
        else:
            result, receipt = await asyncio.gather(service, self._receipt(self._verifier_call(tensor, pending, None)))
            reply = self._reply(result)
        return self.core.finish(query, pending, Reply(reply.output, receipt, reply.raw))

    async def _receipt(self, call: dict[str, Any]) -> str | None:
        try:
            return receipt_text(await self._infer(self._verifier_url, "http", call))
        except ServerError:
            return None  # whoever keeps the verifier from answering gets no better verdict for it

    def _connect(self, url: str, protocol: Protocol) -> Any:
        key = f"{protocol}://{url}"
        if key not in self._connections:
            if protocol == "grpc":
                import tritonclient.grpc.aio as library
            else:
                import tritonclient.http.aio as library
            self._connections[key] = library.InferenceServerClient(url)
        return self._connections[key]

    async def _infer(self, url: str, protocol: Protocol, call: dict[str, Any]) -> Any:
        try:
            return await asyncio.wait_for(self._connect(url, protocol).infer(**call), self._timeout_s)
        except asyncio.TimeoutError:
            raise ServerError(f"{call['model_name']} at {url} gave no answer in time.") from None
        # tritonclient lets through errors of aiohttp, gRPC and sockets besides its own, without a common base.
        except Exception as error:
            raise ServerError(f"{call['model_name']} at {url} gave no answer: {_message(error)}") from None

    async def close(self) -> None:
        """Close the connections."""
        for connection in self._connections.values():
            await connection.close()
        self._connections.clear()
        self.core.judge.close()


def receipt_text(result: Any) -> str | None:
    """The receipt in a response: the first element of its bytes tensor; None where there is none."""
    try:
        tensor = result.as_numpy(RECEIPT_OUTPUT)
    except _UNREADABLE:
        return None
    if tensor is None or not tensor.size:
        return None
    value = tensor.ravel()[0]
    return value.decode("ascii", "replace") if isinstance(value, bytes) else str(value)


def _message(error: Exception) -> str:
    text = error.message() if hasattr(error, "message") and callable(error.message) else ""
    return str(text or type(error).__name__)[:200]
