"""One question of a client to the verifier itself, in the Open Inference Protocol, and what came back.

Whatever answers there may be the host: nothing but the receipt in the answer is believed.
"""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

import httpx
from numpy.typing import NDArray

from fides_plugins import oip
from fides_plugins.attestation.wire import COMMITMENT_PARAMETER, PARAMETER, RECEIPT_OUTPUT
from fides_plugins.client.address import checked_address
from fides_plugins.client.receipts import Brought, Pending, ReceiptChecker
from fides_plugins.errors import ServerError

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
        parameters = {PARAMETER: pending.text}
        if self._checker.scheme == "commitment" and output is not None:
            parameters[COMMITMENT_PARAMETER] = self._checker.commitment(output)
        body, headers = oip.request_body({self._input_name: tensor}, parameters=parameters)
        return {"url": self._url, "content": body, "headers": headers}

    def read(self, response: httpx.Response) -> Brought:
        """The receipt in an answer, or the words that came instead of one."""
        # The body is the host's: it may be anything.
        try:
            outputs = oip.read_answer(response.content, response.headers.get(oip.JSON_LENGTH), (RECEIPT_OUTPUT,))
        except ServerError:
            outputs = {}
        receipt = oip.first_text(outputs, RECEIPT_OUTPUT)
        if receipt is not None:
            return Brought(receipt)
        return Brought(None, _plain(oip.read_error(response.content)) or f"status {response.status_code}, no receipt")


def _plain(text: str) -> str:
    """Foreign words, fit to be printed: one short line without control characters."""
    return "".join(c if c.isprintable() else " " for c in text[:_LONGEST_EXCUSE])
