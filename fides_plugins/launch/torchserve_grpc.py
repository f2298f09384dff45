"""A small gRPC client for TorchServe's inference API.

The `torchserve` wheel ships no Python stubs, so the two messages are described here. Used by
`fides check`, the tests and the benchmarks; needs `grpcio`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from types import TracebackType
from typing import TYPE_CHECKING, Any

from fides_plugins.errors import ServerError

if TYPE_CHECKING:
    from typing_extensions import Self

_PACKAGE = "org.pytorch.serve.grpc.inference"
_SERVICE = f"/{_PACKAGE}.InferenceAPIsService"


@lru_cache(maxsize=1)
def _messages() -> tuple[Any, Any]:
    """Classes of PredictionsRequest and PredictionResponse (inference.proto of TorchServe 0.12)."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(
        name="fides_torchserve_inference.proto", package=_PACKAGE, syntax="proto3"
    )
    request = file.message_type.add(name="PredictionsRequest")
    request.field.add(name="model_name", number=1, type=field.TYPE_STRING, label=field.LABEL_OPTIONAL)
    request.field.add(name="model_version", number=2, type=field.TYPE_STRING, label=field.LABEL_OPTIONAL)
    entry = request.nested_type.add(name="InputEntry")
    entry.options.map_entry = True
    entry.field.add(name="key", number=1, type=field.TYPE_STRING, label=field.LABEL_OPTIONAL)
    entry.field.add(name="value", number=2, type=field.TYPE_BYTES, label=field.LABEL_OPTIONAL)
    request.field.add(
        name="input",
        number=3,
        type=field.TYPE_MESSAGE,
        label=field.LABEL_REPEATED,
        type_name=f".{_PACKAGE}.PredictionsRequest.InputEntry",
    )
    response = file.message_type.add(name="PredictionResponse")
    response.field.add(name="prediction", number=1, type=field.TYPE_BYTES, label=field.LABEL_OPTIONAL)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    made = [
        message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.{name}"))
        for name in ("PredictionsRequest", "PredictionResponse")
    ]
    return made[0], made[1]


class GrpcClient:
    """Asks one TorchServe for predictions over gRPC; a context manager.

    Parameters
    ----------
    target:
        host:port of the gRPC inference API.
    """

    def __init__(self, target: str, timeout_s: float = 60.0) -> None:
        import grpc

        self._grpc = grpc
        self._timeout_s = timeout_s
        request, response = _messages()
        self._request = request
        self._channel = grpc.insecure_channel(target)
        self._predictions = self._channel.unary_unary(
            f"{_SERVICE}/Predictions",
            request_serializer=request.SerializeToString,
            response_deserializer=response.FromString,
        )

    def predict(self, model: str, inputs: Mapping[str, bytes]) -> bytes:
        """Body of the answer.

        Raises
        ------
        ServerError
            If the call fails, with the server's own message.
        """
        try:
            answer = self._predictions(self._request(model_name=model, input=dict(inputs)), timeout=self._timeout_s)
        except self._grpc.RpcError as error:
            raise ServerError(f"gRPC {error.code().name}: {error.details()}") from None
        return bytes(answer.prediction)

    def close(self) -> None:
        """Close the channel."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
