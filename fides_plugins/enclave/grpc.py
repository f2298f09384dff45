"""The verifier over gRPC: the Open Inference Protocol's service on `grpc.aio`.

Messages and service are the generated ones that `tritonclient` carries.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import grpc
import numpy as np
from numpy.typing import NDArray
from tritonclient.grpc import service_pb2, service_pb2_grpc

from fides_plugins import __version__
from fides_plugins.attestation.refusal import Refusal
from fides_plugins.attestation.tensors import OIP_TYPES, tensor_from_bytes
from fides_plugins.enclave import oip
from fides_plugins.enclave.http import ServerLimits, WorkQueue
from fides_plugins.enclave.verifier import Verifier
from fides_plugins.errors import FidesError, InputError

_CODES = {
    "request-client": grpc.StatusCode.PERMISSION_DENIED,
    "request-replay": grpc.StatusCode.ALREADY_EXISTS,
    "request-evidence": grpc.StatusCode.FAILED_PRECONDITION,
    "request-rate": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "request-busy": grpc.StatusCode.UNAVAILABLE,
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
T = TypeVar("T")


class GrpcFront(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    """The methods of the service that a verifier has; the others answer UNIMPLEMENTED."""

    def __init__(self, verifier: Verifier, queue: WorkQueue) -> None:
        self._verifier = verifier
        self._queue = queue

    async def ServerLive(self, request: Any, context: Any) -> Any:
        """Always live."""
        return service_pb2.ServerLiveResponse(live=True)

    async def ServerReady(self, request: Any, context: Any) -> Any:
        """Ready as soon as it listens."""
        return service_pb2.ServerReadyResponse(ready=True)

    async def ServerMetadata(self, request: Any, context: Any) -> Any:
        """Name and version."""
        return service_pb2.ServerMetadataResponse(
            name="fides-verifier", version=__version__, extensions=["fides_receipts"]
        )

    async def ModelReady(self, request: Any, context: Any) -> Any:
        """Whether there is such a model."""
        try:
            oip.check_version(request.version)
            oip.model_metadata(self._verifier, request.name)
        except InputError:
            return service_pb2.ModelReadyResponse(ready=False)
        return service_pb2.ModelReadyResponse(ready=True)

    async def ModelMetadata(self, request: Any, context: Any) -> Any:
        """Inputs and outputs of a model."""

        def describe() -> Any:
            oip.check_version(request.version)
            return service_pb2.ModelMetadataResponse(**oip.model_metadata(self._verifier, request.name))

        return await self._guarded(context, describe)

    async def ModelInfer(self, request: Any, context: Any) -> Any:
        """Answer with a receipt."""

        def answer() -> Any:
            oip.check_version(request.model_version)
            response = oip.infer(self._verifier, request.model_name, _parse(request))
            message = service_pb2.ModelInferResponse(
                model_name=response.model, model_version="1", id=response.request_id
            )
            for name, dtype, shape, raw in oip.describe_outputs(response):
                message.outputs.add(name=name, datatype=dtype, shape=shape)
                message.raw_output_contents.append(raw)
            return message

        return await self._guarded(context, answer)

    async def _guarded(self, context: Any, call: Callable[[], T]) -> T:
        try:
            return await self._queue.run(call)
        except Refusal as refusal:
            code = _CODES.get(refusal.code, grpc.StatusCode.INVALID_ARGUMENT)
            await context.abort(code, f"{refusal.code}: {refusal}")
        except InputError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"request-input: {error}")
        except FidesError:
            await context.abort(grpc.StatusCode.INTERNAL, "verifier: The verifier cannot answer.")
        raise AssertionError("abort raises")


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
            values = np.array(getattr(entry.contents, contents), dtype=OIP_TYPES[entry.datatype])
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
            ("grpc.max_receive_message_length", limits.body_bytes),
            ("grpc.so_reuseport", 0),
            ("grpc.max_metadata_size", 16 << 10),
            ("grpc.http2.max_ping_strikes", 2),
            ("grpc.max_connection_idle_ms", 300_000),
        ],
    )
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(front, server)
    return server, server.add_insecure_port(f"{host}:{port}")
