"""What the verifier answers in the Open Inference Protocol, and how strictly it reads what it is asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fides_plugins import oip
from fides_plugins.attestation.request import to_text
from fides_plugins.attestation.wire import COMMITMENT_PARAMETER, PARAMETER, RECEIPT_OUTPUT, REFERENCE_OUTPUT
from fides_plugins.enclave.bounds import RequestBounds
from fides_plugins.enclave.verifier import Verifier
from fides_plugins.errors import InputError
from fides_plugins.types.query import printable_id

_VERSION = "1"
_MAX_INPUTS = 4


@dataclass(frozen=True)
class InferRequest:
    """One inference request: tensors by name, text parameters, and which outputs are wanted in binary."""

    tensors: dict[str, NDArray[Any]]
    parameters: dict[str, str]
    request_id: str = ""
    binary: bool = False
    binary_outputs: frozenset[str] = frozenset()


def infer(verifier: Verifier, model: str, request: InferRequest) -> oip.Body:
    """Answer a request with a receipt; its outputs take the form that the request asked for.

    Raises
    ------
    InputError, Refusal
        Where the request is not answered.
    """
    _check_model(verifier, model)
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
    outputs: dict[str, NDArray[Any]] = {RECEIPT_OUTPUT: np.array([to_text(answer.receipt)], dtype=np.object_)}
    if answer.reference is not None:
        outputs[REFERENCE_OUTPUT] = answer.reference
    return oip.answer_body(model, outputs, request.request_id, outputs if request.binary else request.binary_outputs)


def model_metadata(verifier: Verifier, model: str) -> dict[str, Any]:
    """Metadata of a model as the protocol wants it.

    Raises
    ------
    InputError
        If there is no such model.
    """
    _check_model(verifier, model)
    spec = verifier.input
    shape = [-1 if d is None else d for d in spec.shape]
    inputs = [{"name": spec.name, "datatype": oip.oip_type(np.dtype(spec.dtype)), "shape": shape}]
    outputs = [
        {"name": RECEIPT_OUTPUT, "datatype": oip.BYTES, "shape": [1]},
        {"name": REFERENCE_OUTPUT, "datatype": "FP32", "shape": [-1, verifier.bundle.n_classes]},
    ]
    return {"name": model, "versions": [_VERSION], "platform": "fides_verifier", "inputs": inputs, "outputs": outputs}


def _check_model(verifier: Verifier, model: str) -> None:
    if model != verifier.bundle.manifest.name:
        raise InputError(f"There is no model {model[:64]!r} here; there is {verifier.bundle.manifest.name!r}.")


def check_version(version: str) -> None:
    """There is one version.

    Raises
    ------
    InputError
        If another one is asked for.
    """
    if version not in ("", _VERSION):
        raise InputError(f"There is no version {version[:16]!r} here, only {_VERSION}.")


def parse_request(body: bytes, json_length: int | None, bounds: RequestBounds) -> InferRequest:
    """Read a request's body.

    Parameters
    ----------
    body:
        The body.
    json_length:
        Bytes of JSON in front of binary tensors; None without these.
    bounds:
        What a request may hold.

    Raises
    ------
    InputError
        If the body is malformed.
    """
    text, tail = oip.split_body(body, json_length)
    bounds.check_json(text)
    document = oip.read_json(text, "inputs")
    if len(document.get("inputs", [])) > _MAX_INPUTS:
        raise InputError(f"More than {_MAX_INPUTS} inputs.")
    tensors = oip.read_tensors(document, "inputs", tail)
    parameters = oip.parameters_of(document)
    outputs = document.get("outputs", [])
    wanted = [o for o in outputs if isinstance(o, dict)] if isinstance(outputs, list) else []
    return InferRequest(
        tensors,
        {k: v for k, v in parameters.items() if isinstance(v, str)},
        request_id=printable_id(document.get("id", "")),
        binary=parameters.get("binary_data_output") is True,
        binary_outputs=frozenset(str(o.get("name")) for o in wanted if oip.parameters_of(o).get("binary_data") is True),
    )
