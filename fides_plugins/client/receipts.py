"""A client's side of a receipt: ask in a way that only the verifier can answer, and check the answer."""

from __future__ import annotations

import hmac
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from numpy.typing import NDArray

from fides_plugins.attestation import sealing
from fides_plugins.attestation.judge import Judge
from fides_plugins.attestation.receipt import Receipt, open_receipt
from fides_plugins.attestation.refusal import Refusal
from fides_plugins.attestation.request import SESSION_BYTES, Scheme, SignedRequest, from_text, to_text
from fides_plugins.attestation.tensors import tensor_digest
from fides_plugins.attestation.verify import TrustedEvidence
from fides_plugins.bundle import Bundle
from fides_plugins.client.trust import Trust
from fides_plugins.oip import oip_type, tensor_from_bytes
from fides_plugins.types import SUM_TOLERANCE, Float32Array

_PREPROCESSING = "none"
_SEQUENCES_KEPT = 4096
_MAX_PENDING = 100_000


@dataclass(frozen=True)
class Brought:
    """What came back for a signed request.

    Attributes
    ----------
    receipt:
        Its text; None where none came.
    excuse:
        What was said instead of a receipt. Nobody signed it, so it explains and proves nothing.
    """

    receipt: str | None
    excuse: str = ""


@dataclass(frozen=True)
class Pending:
    """A request under way.

    Attributes
    ----------
    text:
        The signed request, to be sent as `fides_request`.
    request:
        What it says.
    dtype, shape:
        Of the input.
    evidence:
        Evidence for the key that the request names.
    """

    text: str
    request: SignedRequest
    dtype: str
    shape: tuple[int, ...]
    evidence: TrustedEvidence
    private_key: X25519PrivateKey | None


class ReceiptChecker:
    """Makes signed requests and checks their receipts, each once. Safe to use from several threads.

    Parameters
    ----------
    trust:
        Verifiers that are trusted.
    identity:
        The key that the verifier knows this client by; None makes a new one, for verifiers that answer anybody.
    scheme:
        "hpke" or "commitment".
    bundle:
        The client's own: what it judges by must be what the receipt is for.
    lifetime_s:
        Time after which a request's receipt is refused.
    """

    def __init__(
        self,
        trust: Trust,
        identity: Ed25519PrivateKey | None,
        scheme: Scheme,
        bundle: Bundle,
        lifetime_s: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.trust = trust
        self.scheme: Scheme = scheme
        self._identity = identity or Ed25519PrivateKey.generate()
        self.n_classes = bundle.n_classes
        self._judge = Judge.of(bundle)
        self._lifetime_s = lifetime_s
        self._clock = clock
        self._session = os.urandom(SESSION_BYTES)
        self._lock = threading.Lock()
        self._pending: OrderedDict[bytes, float] = OrderedDict()
        self._sequences: OrderedDict[tuple[bytes, int], None] = OrderedDict()

    def begin(self, tensor: NDArray[Any]) -> Pending:
        """A signed request for one input, (N, ...).

        Raises
        ------
        Refusal, ServerError
            If no verifier is trusted.
        """
        evidence = self.trust.current()
        assert evidence.statement is not None  # `Trust` keeps no other
        key = X25519PrivateKey.generate() if self.scheme == "hpke" else None
        request = SignedRequest(
            key_id=evidence.statement.key_id,
            model=self._judge.model,
            classes=self._judge.classes,
            judge=self._judge.judge,
            input_digest=tensor_digest(tensor),
            scheme=self.scheme,
            client_key=key.public_key().public_bytes_raw() if key is not None else None,
            session=self._session,
        )
        now = self._clock()
        with self._lock:
            while self._pending and (len(self._pending) >= _MAX_PENDING or next(iter(self._pending.values())) < now):
                self._pending.popitem(last=False)
            self._pending[request.nonce] = now + self._lifetime_s
        return Pending(request.encode(self._identity), request, oip_type(tensor.dtype), tensor.shape, evidence, key)

    def commitment(self, output: NDArray[Any]) -> str:
        """The digest of a service output as text: what a host commits to, and what is compared with it."""
        return to_text(tensor_digest(output))

    def check(self, pending: Pending, text: str | None, output: NDArray[Any], excuse: str = "") -> Float32Array:
        """Check a receipt and give the reference in it, (N, K) float32. A request is checked once.

        Parameters
        ----------
        pending:
            From `begin`.
        text:
            The receipt as the host passed it on; None or empty where it did not.
        output:
            The service's output as it arrived; compared with the host's commitment in that scheme.
        excuse:
            What was said instead of a receipt, for people to read.

        Raises
        ------
        Refusal
            `receipt-...`: the answer may not be used. A missing receipt is refused like a wrong one.
        """
        self._spend(pending.request.nonce)
        if not text:
            # Keeping the verifier from answering must not earn a better verdict, whatever is said instead.
            instead = f" Instead came, unsigned: {excuse}" if excuse else ""
            raise Refusal("receipt-missing", f"The host passed no receipt on.{instead}")
        data = from_text(text, "receipt")
        receipt = open_receipt(data, self.trust.keys(), development=pending.evidence.development)
        self._compare(pending, receipt)
        if pending.request.scheme == "commitment":
            committed = receipt.service_digest or b""
            if not hmac.compare_digest(committed, tensor_digest(output)):
                raise Refusal("receipt-commitment", "The answer is not the one that the host committed to beforehand.")
        return self._reference(pending, receipt)

    def _spend(self, nonce: bytes) -> None:
        with self._lock:
            expiry = self._pending.pop(nonce, None)
        if expiry is None:
            raise Refusal("receipt-replay", "The receipt of this request was checked before.")
        if expiry < self._clock():
            raise Refusal("receipt-late", "The receipt came after the request had expired.")

    def _compare(self, pending: Pending, receipt: Receipt) -> None:
        request, statement = pending.request, pending.evidence.statement
        assert statement is not None  # `Trust` keeps no other
        rule = self.trust.policy.models.get(self._judge.model)
        if not hmac.compare_digest(receipt.nonce, request.nonce):
            raise Refusal("receipt-nonce", "The receipt is for another request: an old answer was replayed.")
        if not hmac.compare_digest(receipt.session, request.session):
            raise Refusal("receipt-session", "The receipt is for another client.")
        if receipt.key_id != statement.key_id or receipt.boot_id != statement.boot_id:
            raise Refusal("receipt-start", "The receipt is of another start of the verifier than the one asked.")
        if receipt.tee != pending.evidence.facts.tee:
            raise Refusal("receipt-evidence", "The receipt names another kind of TEE than the evidence.")
        shown = (receipt.input_digest, receipt.input_dtype, receipt.input_shape, receipt.preprocessing)
        sent = (request.input_digest, pending.dtype, pending.shape, _PREPROCESSING)
        if shown != sent:
            raise Refusal("receipt-input", "The verifier was shown another input than the one that was sent.")
        self._judge.check(receipt, "receipt")
        trusted = rule.bundle_digests if rule is not None else ()
        if receipt.bundle_digest != statement.bundle_digest or receipt.bundle_digest.hex() not in trusted:
            raise Refusal("receipt-bundle", "The receipt is of a bundle that the policy does not trust for this model.")
        if rule is not None and receipt.bundle_version < rule.minimum_bundle_version:
            raise Refusal("receipt-bundle-version", "The receipt is of a bundle that is too old.")
        if receipt.scheme != request.scheme:
            raise Refusal("receipt-scheme", "The receipt follows another scheme than the one that was asked for.")
        self._unique((receipt.key_id, receipt.sequence))

    def _unique(self, place: tuple[bytes, int]) -> None:
        """A sequence number that comes twice means that the verifier was copied or rolled back."""
        with self._lock:
            if place in self._sequences:
                raise Refusal("receipt-sequence", "Two receipts of one start of the verifier have the same number.")
            self._sequences[place] = None
            if len(self._sequences) > _SEQUENCES_KEPT:
                self._sequences.popitem(last=False)

    def _reference(self, pending: Pending, receipt: Receipt) -> Float32Array:
        data = receipt.output
        if pending.private_key is not None:
            info = sealing.context(pending.request.nonce, pending.request.input_digest)
            data = sealing.unseal(data, pending.private_key, info)
        rows = pending.shape[0]
        said = (receipt.output_dtype, receipt.output_shape, len(data))
        if said != ("FP32", (rows, self.n_classes), 4 * rows * self.n_classes):
            raise Refusal("receipt-output", f"The reference is not {rows} rows of {self.n_classes} classes.")
        reference = tensor_from_bytes(data, "FP32", receipt.output_shape)
        sums = reference.sum(axis=1, dtype=np.float64)
        # A row of zeros is the verifier's "no answer"; anything else must be a distribution.
        sound = np.isfinite(reference).all() and (reference >= 0).all()
        if not sound or not ((np.abs(sums - 1) <= SUM_TOLERANCE) | (sums == 0)).all():
            raise Refusal("receipt-output", "The reference is not a distribution over the classes.")
        return reference
