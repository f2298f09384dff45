"""The Open Inference Protocol (KServe v2) between transports and the verifier.

HTTP bodies (JSON, and the binary tensor extension that `tritonclient` uses) and gRPC messages become one
`InferRequest`, and one `InferResponse` becomes either. Text in bytes tensors, receipts among it, is ASCII.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fides_plugins.attestation.request import from_text, to_text
from fides_plugins.attestation.tensors import OIP_TYPES, oip_type, tensor_bytes, tensor_from_bytes
from fides_plugins.attestation.wire import COMMITMENT_PARAMETER, PARAMETER, RECEIPT_OUTPUT
from fides_plugins.enclave.bounds import RequestBounds
from fides_plugins.enclave.verifier import Verifier
from fides_plugins.errors import InputError

#: A second model beside the verification model: evidence for clients that speak only this protocol.
EVIDENCE_MODEL = "fides_evidence"
REFERENCE_OUTPUT = "probabilities"
_VERSION = "1"
_MAX_RANK = 8
_MAX_INPUTS = 4


@dataclass(frozen=True)
class InferRequest:
    """One inference request: tensors by name, text parameters, and which outputs are wanted in binary."""

    tensors: dict[str, NDArray[Any]]
    parameters: dict[str, str]
    request_id: str = ""
    binary: bool = False
    binary_outputs: frozenset[str] = frozenset()


@dataclass(frozen=True)
class InferResponse:
    """Outputs by name: numeric arrays, or text as one-element bytes tensors."""

    model: str
    request_id: str
    outputs: dict[str, NDArray[Any] | str] = field(default_factory=dict)


def infer(verifier: Verifier, model: str, request: InferRequest) -> InferResponse:
    """Answer a request with a receipt, or evidence.

    Raises
    ------
    InputError, Refusal
        Where the request is not answered.
    """
    if model == EVIDENCE_MODEL:
        text = request.parameters.get("challenge", "")
        challenge = from_text(text, "request", 64) if text else b""
        return InferResponse(model, request.request_id, {"EVIDENCE": verifier.evidence(challenge).to_json()})
    if model != verifier.bundle.manifest.name:
        raise InputError(f"There is no model {model[:64]!r} here; there is {verifier.bundle.manifest.name!r}.")
    wanted = verifier.input.name
    if set(request.tensors) != {wanted}:
        raise InputError(f"The verification model takes exactly the input {wanted!r}.")
    if PARAMETER not in request.parameters:
        raise InputError(
            f"The parameter {PARAMETER} is missing.", "Only signed requests are answered; use fides_plugins.client."
        )
    answer = verifier.answer(
        request.parameters[PARAMETER], request.tensors[wanted], request.parameters.get(COMMITMENT_PARAMETER, "")
    )
    outputs: dict[str, NDArray[Any] | str] = {RECEIPT_OUTPUT: to_text(answer.receipt)}
    if answer.reference is not None:
        outputs[REFERENCE_OUTPUT] = answer.reference
    return InferResponse(model, request.request_id, outputs)


def model_metadata(verifier: Verifier, model: str) -> dict[str, Any]:
    """Metadata of a model as the protocol wants it.

    Raises
    ------
    InputError
        If there is no such model.
    """
    if model == EVIDENCE_MODEL:
        inputs: list[dict[str, Any]] = []
        outputs = [{"name": "EVIDENCE", "datatype": "BYTES", "shape": [1]}]
    elif model == verifier.bundle.manifest.name:
        spec = verifier.input
        shape = [-1 if d is None else d for d in spec.shape]
        inputs = [{"name": spec.name, "datatype": oip_type(np.dtype(spec.dtype)), "shape": shape}]
        outputs = [
            {"name": RECEIPT_OUTPUT, "datatype": "BYTES", "shape": [1]},
            {"name": REFERENCE_OUTPUT, "datatype": "FP32", "shape": [-1, verifier.bundle.n_classes]},
        ]
    else:
        raise InputError(f"There is no model {model[:64]!r} here; there is {verifier.bundle.manifest.name!r}.")
    return {"name": model, "versions": [_VERSION], "platform": "fides_verifier", "inputs": inputs, "outputs": outputs}


def check_version(version: str) -> None:
    """There is one version.

    Raises
    ------
    InputError
        If another one is asked for.
    """
    if version not in ("", _VERSION):
        raise InputError(f"There is no version {version[:16]!r} here, only {_VERSION}.")


def parse_http(body: bytes, json_length: int | None, bounds: RequestBounds) -> InferRequest:
    """Read an HTTP body.

    Parameters
    ----------
    body:
        The body.
    json_length:
        `Inference-Header-Content-Length`: bytes of JSON in front of binary tensors; None without these.
    bounds:
        What a request may hold.

    Raises
    ------
    InputError
        If the body is malformed.
    """
    if json_length is not None and not 0 <= json_length <= len(body):
        raise InputError("Inference-Header-Content-Length does not fit the body.")
    text = body if json_length is None else body[:json_length]
    tail = memoryview(body)[len(text) :]
    bounds.check_json(text)
    try:
        document = json.loads(text.decode())
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict) or not isinstance(document.get("inputs", []), list):
        raise InputError("The body is not a JSON object of the Open Inference Protocol.")
    entries = document.get("inputs", [])
    if len(entries) > _MAX_INPUTS:
        raise InputError(f"More than {_MAX_INPUTS} inputs.")
    tensors: dict[str, NDArray[Any]] = {}
    position = 0
    for entry in entries:
        name, dtype, shape = _head(entry)
        size = _parameters(entry).get("binary_data_size")
        if size is None:
            tensors[name] = _from_json(entry.get("data"), dtype, shape)
            continue
        if type(size) is not int or not 0 <= size <= len(tail) - position:
            raise InputError(f"binary_data_size of input {name!r} does not fit the body.")
        tensors[name] = tensor_from_bytes(bytes(tail[position : position + size]), dtype, shape)
        position += size
    if position != len(tail):
        raise InputError("The body has bytes that belong to no input.")
    parameters = _parameters(document)
    outputs = document.get("outputs", [])
    wanted = [o for o in outputs if isinstance(o, dict)] if isinstance(outputs, list) else []
    return InferRequest(
        tensors,
        {k: v for k, v in parameters.items() if isinstance(v, str)},
        request_id=str(document.get("id", ""))[:128],
        binary=parameters.get("binary_data_output") is True,
        binary_outputs=frozenset(str(o.get("name")) for o in wanted if _parameters(o).get("binary_data") is True),
    )


def render_http(response: InferResponse, request: InferRequest) -> tuple[bytes, int | None]:
    """Write an HTTP body: the bytes, and the length of its JSON where binary tensors follow."""
    entries: list[dict[str, Any]] = []
    tail = b""
    for name, value in response.outputs.items():
        entry: dict[str, Any] = {"name": name, **_describe(value)}
        if request.binary or name in request.binary_outputs:
            raw = raw_output(value)
            entry["parameters"] = {"binary_data_size": len(raw)}
            tail += raw
        elif isinstance(value, str):
            entry["data"] = [value]
        else:
            entry["data"] = [float(v) for v in value.ravel()]
        entries.append(entry)
    document: dict[str, Any] = {"model_name": response.model, "model_version": _VERSION, "outputs": entries}
    if response.request_id:
        document["id"] = response.request_id
    text = json.dumps(document, separators=(",", ":")).encode()
    return text + tail, len(text) if tail else None


def describe_outputs(response: InferResponse) -> list[tuple[str, str, tuple[int, ...], bytes]]:
    """Name, type, shape and raw bytes of each output, as gRPC wants them."""
    described = []
    for name, value in response.outputs.items():
        head = _describe(value)
        described.append((name, head["datatype"], tuple(head["shape"]), raw_output(value)))
    return described


def raw_output(value: NDArray[Any] | str) -> bytes:
    """A tensor's bytes; text as one element with its length in front (4 bytes, little-endian)."""
    if isinstance(value, str):
        data = value.encode()
        return len(data).to_bytes(4, "little") + data
    return tensor_bytes(value)


def _describe(value: NDArray[Any] | str) -> dict[str, Any]:
    if isinstance(value, str):
        return {"datatype": "BYTES", "shape": [1]}
    return {"datatype": oip_type(value.dtype), "shape": list(value.shape)}


def _parameters(holder: dict[str, Any]) -> dict[str, Any]:
    value = holder.get("parameters", {})
    return value if isinstance(value, dict) else {}


def _head(entry: Any) -> tuple[str, str, tuple[int, ...]]:
    if not isinstance(entry, dict):
        raise InputError("An input is not a JSON object.")
    name, dtype, shape = entry.get("name"), entry.get("datatype"), entry.get("shape")
    if not isinstance(name, str) or not isinstance(dtype, str) or not isinstance(shape, list):
        raise InputError("An input lacks its name, datatype or shape.")
    return name, dtype, checked_shape(shape)


def checked_shape(shape: Any) -> tuple[int, ...]:
    """A shape from outside.

    Raises
    ------
    InputError
        If it has too many dimensions, or one is no count.
    """
    if len(shape) > _MAX_RANK or any(type(d) is not int or not 0 <= d < 1 << 31 for d in shape):
        raise InputError("The shape of an input is not a list of at most 8 counts.")
    return tuple(shape)


def _from_json(data: Any, dtype: str, shape: tuple[int, ...]) -> NDArray[Any]:
    if dtype not in OIP_TYPES:
        raise InputError(f"Inputs of type {dtype[:16]!r} are not supported.")
    wanted = OIP_TYPES[dtype]
    try:
        # As they are first: numpy would make each text of a list as wide as the longest.
        if not set(map(type, np.array(data, dtype=object).ravel())) <= {int, float, bool}:
            raise TypeError
        given = np.asarray(data)
        kinds = {"f": "iuf", "b": "b"}.get(wanted.kind, "iu")
        fits = given.dtype.kind in kinds or not given.size
        if fits and wanted.kind in "iu" and given.size:
            # numpy 1 would wrap numbers around that the type cannot hold.
            fits = int(given.min()) >= np.iinfo(wanted).min and int(given.max()) <= np.iinfo(wanted).max
        if fits:
            return given.astype(wanted).reshape(shape)
    except (ValueError, TypeError, OverflowError, RecursionError):
        pass
    raise InputError(f"The data of an input is not {dtype} of the shape {list(shape)}.")
