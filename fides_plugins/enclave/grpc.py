"""The verifier over gRPC: the Open Inference Protocol's service on `grpc.aio`.

Messages are the generated ones that `tritonclient` carries.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from operator import methodcaller
from typing import Any, TypeVar

import anyio
import grpc
import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from tritonclient.grpc import service_pb2

from fides_plugins import __version__
from fides_plugins.attestation.refusal import Refusal
from fides_plugins.attestation.tensors import OIP_TYPES, tensor_from_bytes
from fides_plugins.enclave import oip
from fides_plugins.enclave.bounds import request_bounds
from fides_plugins.enclave.http import CANNOT_ANSWER, ServerLimits, WorkQueue
from fides_plugins.enclave.messages import check_message
from fides_plugins.enclave.verifier import Verifier
from fides_plugins.errors import FidesError, InputError

logger = logging.getLogger("fides_plugins")
_CODES = {
    "request-client": grpc.StatusCode.PERMISSION_DENIED,
    "request-replay": grpc.StatusCode.ALREADY_EXISTS,
    "request-evidence": grpc.StatusCode.FAILED_PRECONDITION,
    "request-rate": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "request-busy": grpc.StatusCode.UNAVAILABLE,
    "request-memory": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "request-slow": grpc.StatusCode.DEADLINE_EXCEEDED,
}
_CONTENTS = {
    "BOOL": "bool_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
}
#: A message is in memory twice: as it came, and as protobuf has it.
_COPIES = 2
T = TypeVar("T")


class GrpcFront:
    """The methods of the service that a verifier has; the others answer UNIMPLEMENTED.

    Each takes its request as a stream of messages, which looks the same on the wire as one message. So the
    server decides when a message is received, for how long, and what is parsed of it.
    """

    def __init__(self, verifier: Verifier, queue: WorkQueue, limits: ServerLimits) -> None:
        self._verifier = verifier
        self._queue = queue
        self._limits = limits
        self.bounds = request_bounds(verifier.input, verifier.options.max_rows, limits.body_bytes)
        # How long a message is shows when it is complete, so room for the longest is taken; at most half of all, so
        # that slow senders leave the others the rest.
        room = limits.buffered_bytes // 2
        self._receiving = asyncio.Semaphore(max(1, room // (_COPIES * self.bounds.message_bytes)))

    def handler(self) -> Any:
        """The service, for `grpc.aio.Server.add_generic_rpc_handlers`."""
        methods = {
            "ServerLive": self._live,
            "ServerReady": self._ready,
            "ServerMetadata": self._server,
            "ModelReady": self._model_ready,
            "ModelMetadata": self._model,
            "ModelInfer": self._infer,
        }
        write = methodcaller("SerializeToString")
        return grpc.method_handlers_generic_handler(
            service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name,
            {
                name: grpc.stream_unary_rpc_method_handler(method, response_serializer=write)
                for name, method in methods.items()
            },
        )

    # The first three have empty requests, which nobody needs to read.

    async def _live(self, messages: Any, context: Any) -> Any:
        """Always live."""
        return service_pb2.ServerLiveResponse(live=True)

    async def _ready(self, messages: Any, context: Any) -> Any:
        """Ready as soon as it listens."""
        return service_pb2.ServerReadyResponse(ready=True)

    async def _server(self, messages: Any, context: Any) -> Any:
        """Name and version."""
        return service_pb2.ServerMetadataResponse(
            name="fides-verifier", version=__version__, extensions=["fides_receipts"]
        )

    async def _model_ready(self, messages: Any, context: Any) -> Any:
        """Whether there is such a model."""

        def look(data: bytes) -> Any:
            try:
                self._describe(data, service_pb2.ModelReadyRequest)
            except InputError:
                return service_pb2.ModelReadyResponse(ready=False)
            return service_pb2.ModelReadyResponse(ready=True)

        return await self._answered(context, look)

    async def _model(self, messages: Any, context: Any) -> Any:
        """Inputs and outputs of a model."""

        def describe(data: bytes) -> Any:
            return service_pb2.ModelMetadataResponse(**self._describe(data, service_pb2.ModelMetadataRequest))

        return await self._answered(context, describe)

    def _describe(self, data: bytes, kind: Any) -> dict[str, Any]:
        with self._queue.parsing:
            request = self._message(data, kind)
            oip.check_version(request.version)
            return oip.model_metadata(self._verifier, request.name)

    async def _infer(self, messages: Any, context: Any) -> Any:
        """Answer with a receipt."""

        def answer(data: bytes) -> Any:
            with self._queue.parsing:
                request = self._message(data, service_pb2.ModelInferRequest)
                oip.check_version(request.model_version)
                model, parsed = request.model_name, _parse(request)
                del request
            response = oip.infer(self._verifier, model, parsed)
            message = service_pb2.ModelInferResponse(
                model_name=response.model, model_version="1", id=response.request_id
            )
            for name, dtype, shape, raw in oip.describe_outputs(response):
                message.outputs.add(name=name, datatype=dtype, shape=shape)
                message.raw_output_contents.append(raw)
            return message

        return await self._answered(context, answer)

    async def _answered(self, context: Any, call: Callable[[bytes], T]) -> T:
        """The call's answer to the message that comes, or a status for the peer."""
        try:
            return await self._called(context, call)
        except Refusal as refusal:
            code = _CODES.get(refusal.code, grpc.StatusCode.INVALID_ARGUMENT)
            fault = code, f"{refusal.code}: {refusal}"
        except InputError as error:
            fault = grpc.StatusCode.INVALID_ARGUMENT, f"request-input: {error}"
        except FidesError as error:
            logger.error("the verifier cannot answer: %s", error)
            fault = grpc.StatusCode.INTERNAL, f"verifier: {CANNOT_ANSWER}"
        except Exception:
            # What nobody foresaw is for the operator only.
            logger.exception("an unforeseen error")
            fault = grpc.StatusCode.INTERNAL, f"verifier: {CANNOT_ANSWER}"
        await context.abort(*fault)
        raise AssertionError("abort raises")

    async def _called(self, context: Any, call: Callable[[bytes], T]) -> T:
        data = await self._receive(context)
        return await self._queue.run(lambda: call(data), held=_COPIES * len(data))

    async def _receive(self, context: Any) -> bytes:
        """The message, within size and time; its bytes stay taken from the queue's `bodies`."""
        bodies, most, held = self._queue.bodies, _COPIES * self.bounds.message_bytes, 0
        try:
            with anyio.fail_after(self._limits.body_timeout_s):
                async with self._receiving:
                    bodies.take(most)
                    held = most
                    data = await context.read()
        except BaseException as error:
            bodies.give(held)
            if isinstance(error, TimeoutError):
                raise Refusal("request-slow", "The message did not arrive in time.") from None
            raise
        if data is grpc.aio.EOF:
            data = b""
        bodies.give(most - _COPIES * len(data))
        return bytes(data)

    def _message(self, data: bytes, kind: Any) -> Any:
        check_message(data, kind.DESCRIPTOR, self.bounds.values)
        try:
            return kind.FromString(data)
        except DecodeError:
            raise InputError(f"The message is no {kind.DESCRIPTOR.name} of the Open Inference Protocol.") from None


def _parse(message: Any) -> oip.InferRequest:
    raws = list(message.raw_input_contents)
    if raws and len(raws) != len(message.inputs):
        raise InputError("raw_input_contents does not fit the inputs.")
    tensors: dict[str, NDArray[Any]] = {}
    for index, entry in enumerate(message.inputs):
        shape = oip.checked_shape(entry.shape)
        if raws:
            tensors[entry.name] = tensor_from_bytes(raws[index], entry.datatype, shape)
            continue
        contents = _CONTENTS.get(entry.datatype)
        if contents is None:
            raise InputError(f"Inputs of type {entry.datatype[:16]!r} are not supported in this form.")
        try:
            given = getattr(entry.contents, contents)
            # One after the other: a list of them all would take ten times their bytes.
            values = np.fromiter(given, OIP_TYPES[entry.datatype], len(given))
            tensors[entry.name] = values.reshape(shape)
        except (ValueError, OverflowError):
            raise InputError(f"The data of an input is not {entry.datatype} of the shape {list(shape)}.") from None
    parameters = {
        k: v.string_param for k, v in message.parameters.items() if v.WhichOneof("parameter_choice") == "string_param"
    }
    return oip.InferRequest(tensors, parameters, request_id=message.id[:128])


async def make_server(front: GrpcFront, host: str, port: int, limits: ServerLimits) -> tuple[Any, int]:
    """A server that is not started yet, and its port.

    Raises
    ------
    RuntimeError
        If the port cannot be bound.
    """
    server = grpc.aio.server(
        maximum_concurrent_rpcs=limits.workers + limits.queue,
        options=[
            ("grpc.max_receive_message_length", front.bounds.message_bytes),
            ("grpc.so_reuseport", 0),
            # Only what is being received may be on its way: otherwise each connection announces megabytes of room.
            ("grpc.http2.bdp_probe", 0),
            ("grpc.max_metadata_size", 16 << 10),
            ("grpc.http2.max_ping_strikes", 2),
            ("grpc.max_connection_idle_ms", 300_000),
        ],
    )
    server.add_generic_rpc_handlers((front.handler(),))
    return server, server.add_insecure_port(f"{host}:{port}")
