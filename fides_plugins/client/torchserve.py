"""Clients for TorchServe: the answer of an untrusted server, judged here.

TorchServe knows no tensors, only bodies: `encode` and `decode` say how the served handler wants its input
and gives its answer. The signed request travels in the header X-Fides-Request; the receipt comes back in
X-Fides-Receipt, or the client asks the verifier itself (`receipt_from="verifier"`). What the verifier sees
must be the handler's tensor, bit by bit, so the client sends that tensor and no picture.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import numpy as np
from numpy.typing import NDArray

from fides_plugins.attestation.policy import EvidencePolicy
from fides_plugins.attestation.wire import RECEIPT_HEADER, REQUEST_HEADER
from fides_plugins.bundle import Bundle
from fides_plugins.client.address import checked_address
from fides_plugins.client.calls import AsyncCalls, Calls, Client, Reply
from fides_plugins.client.receipts import Brought, Pending
from fides_plugins.errors import InputError, ServerError
from fides_plugins.types import Query

Encode = Callable[[Mapping[str, NDArray[Any]]], tuple[bytes, str]]
Decode = Callable[[bytes], NDArray[Any]]


def encode_json(inputs: Mapping[str, NDArray[Any]]) -> tuple[bytes, str]:
    """One row as a JSON object, name to nested lists without the row axis, and its content type."""
    for name, array in inputs.items():
        if len(array) != 1:
            raise InputError(f"Input {name!r} has {len(array)} rows; a TorchServe request carries one.")
    return json.dumps({name: array[0].tolist() for name, array in inputs.items()}).encode(), "application/json"


def decode_json(body: bytes) -> NDArray[Any]:
    """Class numbers of one row from a JSON list, or from a list of one list; (1, K) float32."""
    array = np.asarray(json.loads(body), dtype=np.float32)
    return array[None] if array.ndim == 1 else array


class _TorchServeBase(Client):
    """Configuration and message building of both TorchServe clients."""

    _no_commitment = "TorchServe's host verifies while the model runs, so it cannot commit to its output beforehand."

    def __init__(
        self,
        url: str,
        model: str,
        bundle: Bundle | str | Path,
        policy: EvidencePolicy,
        *,
        encode: Encode = encode_json,
        decode: Decode = decode_json,
        headers: Mapping[str, str] | None = None,
        **client: Any,
    ) -> None:
        super().__init__(bundle, policy, **client)
        self._url = f"{checked_address(url, 'TorchServe')}/predictions/{quote(model, safe='')}"
        self._encode, self._decode = encode, decode
        self._headers = dict(headers or {})

    async def _service(self, query: Query, pending: Pending) -> Reply:
        body, kind = self._encode(query.inputs)
        headers = {**self._headers, "content-type": kind}
        if self.receipt_from == "host":
            headers[REQUEST_HEADER] = pending.text
        try:
            response = await self._http_call(1, method="POST", url=self._url, content=body, headers=headers)
        except httpx.HTTPError as error:
            raise ServerError(f"{self._url} gave no answer ({type(error).__name__}).") from None
        if response.status_code != 200:
            raise ServerError(f"{self._url} answered with status {response.status_code}.")
        try:
            output = np.asarray(self._decode(response.content))
        # The body is the host's, and `decode` may be the caller's: anything may go wrong in it.
        except Exception as error:
            raise ServerError(
                f"{self._url} gave an answer that cannot be decoded ({type(error).__name__}).", "Give `decode`."
            ) from None
        return Reply(output, Brought(response.headers.get(RECEIPT_HEADER)), response)


class TorchServeClient(_TorchServeBase, Calls):
    """A client of one served model; each call carries one row.

    Parameters
    ----------
    url:
        `http://host:port` of TorchServe's inference API.
    model:
        The served model.
    bundle, policy, verifier_url, evidence, identity, scheme, settings, roots, insecure_development:
        See `Client`.
    receipt_from:
        "host" or "verifier": see the module.
    encode, decode:
        Inputs to body and content type; body to class output (1, K).
    headers:
        More request headers, such as an authorization token.
    timeout_s:
        For one question: see `Client`.
    """


class AsyncTorchServeClient(_TorchServeBase, AsyncCalls):
    """`TorchServeClient` for asyncio: many requests may be under way at once."""
