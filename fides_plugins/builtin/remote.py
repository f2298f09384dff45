"""fides_verify by a verifier in an enclave: passes the client's signed request on, and the receipt back.

Configured by its options, `settings.plugins.options["remote"]`: `url` of the verifier (http://host:port)
and `model`, the name of its model (default: the bundle's). It needs nothing but the standard library and
numpy, so it runs inside Triton's python backend and in a TorchServe worker.

In the scheme "hpke" the host cannot read the reference: the rows are `indeterminate` here, and the client
decides. In the scheme "commitment" the reference is used here as well. Requests of clients that send no
signed request are not judged. Time-out and circuit breaker are the pipeline's.
"""

from __future__ import annotations

import http.client
import threading
from typing import Any
from urllib.parse import quote, urlsplit

import numpy as np
from numpy.typing import NDArray

from fides_plugins import oip
from fides_plugins.attestation.wire import COMMITMENT_PARAMETER, PARAMETER, RECEIPT_OUTPUT, REFERENCE_OUTPUT
from fides_plugins.bundle import Bundle
from fides_plugins.errors import ServerError, SettingsError
from fides_plugins.hookspecs import hookimpl
from fides_plugins.settings import Settings
from fides_plugins.types import Query, SignedRows, Verification

NAME = "remote"
#: Key of the evidence under which the receipts come back: one text per request, empty where there is none.
RECEIPTS = "receipts"
_MAX_ANSWER = 16 << 20


def receipts_of(verification: Verification | None, n_requests: int) -> tuple[str, ...]:
    """The receipts of a batch, one text per part of `Query.signed`; empty texts where there are none."""
    for evidence in verification.evidence if verification is not None else ():
        receipts = evidence.get(RECEIPTS)
        if isinstance(receipts, list) and len(receipts) == n_requests:
            return tuple(r if isinstance(r, str) else "" for r in receipts)
    return ("",) * n_requests


class RemoteVerifier:
    """Calls a verifier over the Open Inference Protocol."""

    @hookimpl
    def fides_configure(self, settings: Settings, bundle: Bundle | None) -> None:
        """Read the address; nothing is called yet.

        Raises
        ------
        SettingsError
            If the options are incomplete or unknown.
        """
        options = dict(settings.plugins.options.get(NAME, {}))
        parts = urlsplit(str(options.pop("url", "")))
        model = str(options.pop("model", "") or (bundle.manifest.name if bundle is not None else ""))
        if options:
            raise SettingsError(f"Unknown option {sorted(options)[0]!r} of the plug-in remote.", "Use url and model.")
        if parts.scheme not in ("http", "https") or not parts.hostname or not model or bundle is None:
            raise SettingsError(
                "The plug-in remote needs the address of a verifier.",
                "Set plugins.options.remote.url to http://host:port.",
            )
        self._kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._host, self._port = parts.hostname, parts.port
        self._path = f"/v2/models/{quote(model, safe='')}/infer"
        self._timeout_s = settings.timeout_ms / 1000.0
        self._input = settings.input or (bundle.manifest.input.name if bundle.manifest.input is not None else "")
        self._n_classes = bundle.n_classes
        # A connection belongs to one thread; the pipeline calls from a few that it keeps.
        self._local = threading.local()

    @hookimpl
    def fides_verify(self, query: Query) -> Verification | None:
        """(N, 1, K): references where they are readable, and the receipts as evidence.

        None where no row of the batch came with a signed request.

        Raises
        ------
        ServerError
            If the verifier cannot be reached, or answers with a server error, before any receipt came.
        """
        if not query.signed:
            return None
        tensor = query.tensor(self._input)
        references = np.full((query.n_rows, self._n_classes), 1.0 / self._n_classes, dtype=np.float32)
        available = np.zeros(query.n_rows, dtype=np.bool_)
        receipts: list[str] = []
        start = 0
        for part in query.signed:
            rows = slice(start, start + part.n_rows)
            start = rows.stop
            try:
                receipt, reference = self._ask(tensor[rows], part) if part.request else ("", None)
            except ServerError:
                if not any(receipts):
                    raise
                # These requests are spent, so the receipts must not be lost; the next call meets the failure at once.
                receipts += [""] * (len(query.signed) - len(receipts))
                break
            receipts.append(receipt)
            if reference is not None and reference.shape == references[rows].shape:
                references[rows], available[rows] = reference, True
        return Verification.single(references, NAME, available, {RECEIPTS: receipts})

    def _ask(self, tensor: NDArray[Any], part: SignedRows) -> tuple[str, NDArray[np.float32] | None]:
        parameters = {PARAMETER: part.request}
        if part.commitment:
            parameters[COMMITMENT_PARAMETER] = part.commitment
        body, headers = oip.request_body({self._input: tensor}, parameters=parameters)
        status, json_length, answer = self._post(body, headers)
        if status >= 500:
            raise ServerError(f"The verifier answered with status {status}.")
        if status != 200:
            # Only this client's request was refused (too many, too slow, wrong): it gets no receipt, and the other
            # requests are unaffected.
            return "", None
        outputs = oip.read_answer(answer, json_length, (RECEIPT_OUTPUT, REFERENCE_OUTPUT))
        receipt = oip.first_text(outputs, RECEIPT_OUTPUT)
        if receipt is None:
            raise ServerError("The verifier answered without a receipt.")
        return receipt, outputs.get(REFERENCE_OUTPUT)

    def _post(self, body: bytes, headers: dict[str, str]) -> tuple[int, str | None, bytes]:
        """One request over this thread's connection; a stale one is opened again once."""
        for attempt in range(2):
            kept: http.client.HTTPConnection | None = getattr(self._local, "connection", None)
            connection = kept or self._kind(self._host, self._port, timeout=self._timeout_s)
            self._local.connection = connection
            try:
                connection.request("POST", self._path, body=body, headers=headers)
                response = connection.getresponse()
                return response.status, response.headers.get(oip.JSON_LENGTH), response.read(_MAX_ANSWER)
            except (OSError, http.client.HTTPException) as error:
                connection.close()
                self._local.connection = None
                # Only a connection that the peer closed while idle is tried again: a request is single-use.
                if attempt or kept is None or isinstance(error, TimeoutError):
                    raise ServerError("The verifier cannot be reached.") from None
        raise AssertionError("the second attempt returns or raises")
