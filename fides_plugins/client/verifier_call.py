"""One question of a client to the verifier itself, in the Open Inference Protocol, and what came back.

Whatever answers there may be the host: nothing but the receipt in the answer is believed.
"""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import quote

import httpx
import numpy as np
from numpy.typing import NDArray

from fides_plugins.attestation.tensors import oip_type, tensor_bytes
from fides_plugins.attestation.wire import COMMITMENT_PARAMETER, PARAMETER, RECEIPT_OUTPUT
from fides_plugins.client.address import checked_address
from fides_plugins.client.receipts import Brought, Pending, ReceiptChecker

_LONGEST_EXCUSE = 200


class VerifierCall:
    """How a verifier is asked for a receipt.

    Parameters
    ----------
    url:
        `http://host:port`, or https where a proxy before the verifier speaks TLS.
    model, input_name:
        Under which the verifier serves the bundle.
    checker:
        Whose scheme says whether a commitment goes along.
    """

    def __init__(self, url: str, model: str, input_name: str, checker: ReceiptChecker) -> None:
        self._url = f"{checked_address(url, 'a verifier')}/v2/models/{quote(model, safe='')}/infer"
        self._input_name = input_name
        self._checker = checker

    def request(self, tensor: NDArray[Any], pending: Pending, output: NDArray[Any] | None) -> dict[str, Any]:
        """Arguments of httpx's `post`; `output` is the service's, to commit to it where the scheme wants that."""
        raw = tensor_bytes(tensor)
        parameters = {PARAMETER: pending.text}
        if self._checker.scheme == "commitment" and output is not None:
            parameters[COMMITMENT_PARAMETER] = self._checker.commitment(output)
        entry = {
            "name": self._input_name,
            "shape": list(tensor.shape),
            "datatype": oip_type(np.asarray(tensor).dtype),
            "parameters": {"binary_data_size": len(raw)},
        }
        head = json.dumps({"parameters": parameters, "inputs": [entry]}).encode()
        headers = {"Inference-Header-Content-Length": str(len(head)), "content-type": "application/octet-stream"}
        return {"url": self._url, "content": head + raw, "headers": headers}

    def read(self, response: httpx.Response) -> Brought:
        """The receipt in an answer, or the words that came instead of one."""
        try:
            document = response.json()
        # The body is the host's: nested too deep for the parser, no text, no JSON.
        except (ValueError, RecursionError):
            return Brought(None, f"status {response.status_code} and no JSON")
        try:
            outputs = {o["name"]: o for o in document["outputs"]}
            return Brought(str(outputs[RECEIPT_OUTPUT]["data"][0]))
        except (KeyError, TypeError, IndexError):
            words = document.get("error") if isinstance(document, dict) else None
            return Brought(None, _plain(words) if isinstance(words, str) else f"status {response.status_code}")

    @staticmethod
    def no_answer(error: httpx.HTTPError) -> Brought:
        """What is known where no answer came at all."""
        return Brought(None, f"no answer ({type(error).__name__})")


def _plain(text: str) -> str:
    """Foreign words, fit to be printed: one short line without control characters."""
    return "".join(c if c.isprintable() else " " for c in text[:_LONGEST_EXCUSE])
