"""A small gRPC client for TorchServe's inference API, for the tests and the benchmarks; needs `grpcio`.

The `torchserve` wheel ships no Python stubs. The two messages (inference.proto of TorchServe 0.12) hold nothing but
texts and bytes, so they are written and read here.
"""

from __future__ import annotations

from collections.abc import Mapping

from fides_plugins.errors import ServerError

_METHOD = "/org.pytorch.serve.grpc.inference.InferenceAPIsService/Predictions"


def _field(number: int, data: bytes) -> bytes:
    """A protobuf field that has a length: its tag, the length as a varint, and `data`."""
    length, rest = b"", len(data)
    while rest > 0x7F:
        length += bytes([rest & 0x7F | 0x80])
        rest >>= 7
    return bytes([number << 3 | 2]) + length + bytes([rest]) + data


def _prediction(answer: bytes) -> bytes:
    """The one field of a PredictionResponse; an empty field is left out of the message."""
    end_of_length = next((i for i in range(1, len(answer)) if answer[i] <= 0x7F), 0)
    return answer[end_of_length + 1 :]


class GrpcClient:
    """Asks one TorchServe for predictions over gRPC; a context manager.

    Parameters
    ----------
    target:
        host:port of the gRPC inference API.
    """

    def __init__(self, target: str, timeout_s: float = 60.0) -> None:
        import grpc

        self._rpc_error = grpc.RpcError
        self._timeout_s = timeout_s
        self._channel = grpc.insecure_channel(target)
        self._predictions = self._channel.unary_unary(_METHOD)

    def predict(self, model: str, inputs: Mapping[str, bytes]) -> bytes:
        """Body of the answer.

        Raises
        ------
        ServerError
            If the call fails, with the server's own message.
        """
        entries = [_field(3, _field(1, name.encode()) + _field(2, data)) for name, data in inputs.items()]
        try:
            answer = self._predictions(_field(1, model.encode()) + b"".join(entries), timeout=self._timeout_s)
        except self._rpc_error as error:
            raise ServerError(f"gRPC {error.code().name}: {error.details()}") from None
        return _prediction(answer)

    def __enter__(self) -> GrpcClient:
        return self

    def __exit__(self, *error: object) -> None:
        self._channel.close()
