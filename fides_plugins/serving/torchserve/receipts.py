"""Signed requests in a batch's headers, and the receipts that a verifier in an enclave gave for them.

Over HTTP only: TorchServe's gRPC interface hands no headers to a handler. Rows and requests must be one to
one within one call of `inference()`; otherwise nothing is passed on, and the client takes that for an attack.
"""

from __future__ import annotations

from typing import Any

from fides_plugins.attestation.wire import COMMITMENT_HEADER, RECEIPT_HEADER, REQUEST_HEADER
from fides_plugins.builtin.remote import receipts_of
from fides_plugins.pipeline import VerifyOutcome
from fides_plugins.types import SignedRows

_MAX_HEADER = 2048


class Receipts:
    """The receipts of one batch."""

    def __init__(self, context: Any, n_requests: int) -> None:
        self._parts = tuple(_signed(context.get_all_request_header(i)) for i in range(n_requests))
        self._texts: tuple[str, ...] = ()

    def signed(self, n_rows: int) -> tuple[SignedRows, ...]:
        """The signed requests of a query of `n_rows` rows; none where rows and requests are not one to one."""
        return self._parts if n_rows == len(self._parts) else ()

    def collect(self, outcome: VerifyOutcome) -> None:
        """Take the receipts from a verification."""
        texts = receipts_of(outcome.verification, len(self._parts))
        if any(texts):
            self._texts = texts

    def write(self, context: Any) -> None:
        """Put each receipt into its response's headers, whatever the mode: its client asked for it."""
        for index, text in enumerate(self._texts):
            if text and len(text) <= _MAX_HEADER and text.isascii() and text.isprintable():
                context.set_response_header(index, RECEIPT_HEADER.lower(), text)


def _signed(headers: Any) -> SignedRows:
    found = {str(name).lower(): _text(value) for name, value in dict(headers or {}).items()}
    return SignedRows(1, found.get(REQUEST_HEADER.lower(), ""), found.get(COMMITMENT_HEADER.lower(), ""))


def _text(value: Any) -> str:
    return bytes(value).decode("latin-1") if isinstance(value, (bytes, bytearray)) else str(value)
