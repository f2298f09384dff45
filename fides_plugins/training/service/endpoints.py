"""Live endpoints as teachers: Triton over gRPC, TorchServe over HTTP."""

from __future__ import annotations

import hashlib
import io
import json
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from fides_plugins.bundle import InputSpec
from fides_plugins.errors import TrainingError
from fides_plugins.training.data import image_layout
from fides_plugins.training.service.teacher import CHUNK_ROWS, Teacher, pick_tensor

#: The most that an endpoint may take for one request.
TIMEOUT_S = 30.0
#: How a row can be sent to TorchServe.
ENCODINGS = ["json", "npy", "png"]
_REMEDY = "Start it again and repeat the command: answers received so far are kept and not asked for again."


class TritonTeacher(Teacher):
    """A model behind a Triton server, asked over gRPC.

    Parameters
    ----------
    address:
        host:port of the gRPC endpoint.
    model, version:
        As the server names them; an empty version is the server's choice.
    """

    def __init__(
        self, address: str, model: str, version: str = "", input_name: str = "", output_name: str = ""
    ) -> None:
        import tritonclient.grpc as grpc
        from tritonclient.utils import InferenceServerException, triton_to_np_dtype

        self.name = f"Triton model {model}"
        self._grpc, self._failure = grpc, InferenceServerException
        self._model, self._version = model, version
        try:
            self._client = grpc.InferenceServerClient(address)
            metadata = self._client.get_model_metadata(model, version, client_timeout=TIMEOUT_S)
            config = self._client.get_model_config(model, version, client_timeout=TIMEOUT_S).config
        except InferenceServerException as error:
            raise TrainingError(
                f"{self.name} at {address} does not answer: {error.message()}.", "Check address, name and version."
            ) from error
        self.batch = config.max_batch_size or CHUNK_ROWS  # 0: the server does not batch
        source = pick_tensor(metadata.inputs, input_name, "input", self.name)
        target = pick_tensor(metadata.outputs, output_name, "output", self.name)
        self._input, self._output, self._datatype = source.name, target.name, source.datatype
        shape = [int(s) if int(s) >= 0 else None for s in source.shape]
        dtype = np.dtype(triton_to_np_dtype(source.datatype))
        self.input = InputSpec(name=source.name, dtype=dtype.name, shape=(None, *shape[1:]))
        # The server's model files cannot be seen: names, versions and tensors stand for them. The address does
        # not count, so that a server that was moved goes on where it stopped; `AnswerCache` asks one row again.
        about = [model, version, sorted(metadata.versions), source.name, source.datatype, shape, target.name]
        self.digest = hashlib.sha256(repr(about).encode()).hexdigest()

    def answer(self, rows: NDArray[Any]) -> NDArray[Any]:
        tensor = self._grpc.InferInput(self._input, list(rows.shape), self._datatype)
        tensor.set_data_from_numpy(rows)
        wanted = [self._grpc.InferRequestedOutput(self._output)]
        try:
            answer = self._client.infer(self._model, [tensor], self._version, outputs=wanted, client_timeout=TIMEOUT_S)
        except self._failure as error:
            raise TrainingError(f"{self.name} stopped answering: {error.message()}.", _REMEDY) from error
        return np.asarray(answer.as_numpy(self._output))

    def close(self) -> None:
        self._client.close()


def _encode(row: NDArray[Any], encoding: str, key: str) -> tuple[bytes, str]:
    """One row as the body of an HTTP request, and its content type."""
    if encoding == "json":
        return json.dumps({key: row.tolist()} if key else row.tolist()).encode(), "application/json"
    buffer = io.BytesIO()
    if encoding == "npy":
        np.save(buffer, row, allow_pickle=False)
        return buffer.getvalue(), "application/octet-stream"
    from PIL import Image

    layout = image_layout((None, *row.shape))
    if layout is None or row.dtype != np.uint8:
        raise TrainingError("Only uint8 images can be sent as PNG.", "Choose the encoding json or npy.")
    pixels = row if layout.channels_last or row.ndim == 2 else row.transpose(1, 2, 0)
    Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(buffer, "PNG")
    return buffer.getvalue(), "image/png"


class TorchServeTeacher(Teacher):
    """A model behind TorchServe, asked over HTTP, one row per request.

    Parameters
    ----------
    url:
        `http://host:port/predictions/model[/version]`.
    encoding:
        How a row is sent: "json" (nested lists), "npy" (the bytes of an .npy file) or "png" (uint8 images).
    request_key, response_key:
        Where JSON bodies hold the row and the class values, such as "x" in {"x": [...]}; empty: the body
        itself.

    Class values that are understood: a list of K numbers, such a list in a list of one or under an only
    key, or an object from class index to number with every class in it.
    """

    batch = 1

    def __init__(self, url: str, encoding: str = "json", request_key: str = "", response_key: str = "") -> None:
        import httpx

        if encoding not in ENCODINGS:
            raise TrainingError(f"There is no encoding {encoding!r}; choose one of {ENCODINGS}.")
        self._failure = httpx.HTTPError
        self._client = httpx.Client(timeout=TIMEOUT_S)
        if request_key and encoding != "json":
            raise TrainingError(f"A request key needs the encoding json, not {encoding}.")
        self._url, self._encoding = url, encoding
        self._request_key, self._response_key = request_key, response_key
        self.name = f"TorchServe model {urlsplit(url).path.removeprefix('/predictions/')}"
        about = f"{urlsplit(url).path} {encoding} {request_key} {response_key}"
        self.digest = hashlib.sha256(about.encode()).hexdigest()

    def answer(self, rows: NDArray[Any]) -> NDArray[Any]:
        body, kind = _encode(rows[0], self._encoding, self._request_key)
        try:
            response = self._client.post(self._url, content=body, headers={"Content-Type": kind})
        except self._failure as error:
            raise TrainingError(f"{self.name} stopped answering: {error}.", _REMEDY) from error
        if response.status_code >= 500:
            raise TrainingError(f"{self.name} answered with status {response.status_code}.", _REMEDY)
        if response.status_code != 200:
            raise TrainingError(
                f"{self.name} refused a row with status {response.status_code}.", "Check the URL and the encoding."
            )
        return np.array([self._parse(response.content)], np.float32)

    def _parse(self, content: bytes) -> list[float]:
        try:
            value = json.loads(content)
            if self._response_key:
                value = (value[0] if isinstance(value, list) else value)[self._response_key]
            while isinstance(value, (list, dict)) and len(value) == 1:
                value = value[0] if isinstance(value, list) else next(iter(value.values()))
            if isinstance(value, dict) and sorted(map(int, value)) == list(range(len(value))):
                value = [value[str(i)] for i in range(len(value))]
            if isinstance(value, list):
                return [float(v) for v in value]
        except (ValueError, TypeError, KeyError):
            pass  # whatever it was that did not fit, the error below says it
        raise TrainingError(
            f"{self.name} answered with something that is no list of all class values.",
            "Say with --response-key where they are; a handler that gives only its top classes cannot teach.",
        )

    def close(self) -> None:
        self._client.close()
