"""The verifier itself: keys, evidence, the model and receipts. Knows no transport.

Keys are made here when the object is made and are never written, sent or logged. Every answer is a signed
receipt; there is no way to get a reference without one.
"""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, get_args

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from numpy.typing import NDArray

from fides_plugins import __version__
from fides_plugins.attestation import receipt, sealing
from fides_plugins.attestation.evidence import CHALLENGE_BYTES, Evidence, Statement
from fides_plugins.attestation.judge import Judge
from fides_plugins.attestation.refusal import Refusal
from fides_plugins.attestation.request import Scheme, SignedRequest, decode_commitment
from fides_plugins.attestation.tensors import tensor_digest
from fides_plugins.builtin.verify import OnnxVerifier
from fides_plugins.bundle import Bundle
from fides_plugins.enclave.limits import RateLimit, SpentNonces
from fides_plugins.enclave.providers import Provider
from fides_plugins.enclave.rounding import round_rows
from fides_plugins.errors import BundleError, InputError
from fides_plugins.oip import oip_type
from fides_plugins.settings import Settings
from fides_plugins.types import Float32Array, Query

_PREPROCESSING = "none"


@dataclass(frozen=True)
class VerifierOptions:
    """How a verifier behaves.

    Attributes
    ----------
    clients:
        Ed25519 public keys (32 bytes each) that are answered; empty: everybody, the host included, who
        can then learn each reference by asking for it in its own name.
    client_set:
        The signed set that `clients` come from, shown in the evidence; empty where they come from nowhere else.
    schemes:
        Schemes that are offered.
    decimals:
        Places to which references are rounded, against extraction of the model; None: not rounded.
    collateral, vcek, chain:
        Handed out with the evidence, so that clients can verify offline.
    rate, burst:
        Rows per second and client.
    nonces, nonce_lifetime_s:
        How long a spent nonce is remembered, and how many are where anybody is answered: clients that are listed are
        bounded by their rate. A request's receipt is of use for half that time.
    max_rows:
        Rows of one request.
    """

    clients: frozenset[bytes] = frozenset()
    client_set: str = ""
    schemes: tuple[Scheme, ...] = get_args(Scheme)
    decimals: int | None = None
    collateral: str = ""
    vcek: bytes = b""
    chain: str = ""
    rate: float = 1000.0
    burst: float = 2000.0
    nonces: int = 200_000
    nonce_lifetime_s: float = 120.0
    max_rows: int = 1024


@dataclass(frozen=True)
class SignedAnswer:
    """What goes back to the client.

    Attributes
    ----------
    receipt:
        The signed receipt.
    reference:
        (N, K) float32 in the clear for the scheme "commitment"; None where only the receipt may hold it.
    """

    receipt: bytes
    reference: Float32Array | None


class Verifier:
    """Answers signed requests with receipts.

    Parameters
    ----------
    bundle:
        A bundle with a verification model.
    provider:
        Where evidence comes from.
    options:
        See `VerifierOptions`.
    threads:
        Intra-op threads of the model.
    clock:
        Seconds since 1970: the host's, advisory.

    Raises
    ------
    FidesError
        If the bundle has no verification model, or the hardware gives no evidence.
    """

    def __init__(
        self,
        bundle: Bundle,
        provider: Provider,
        options: VerifierOptions | None = None,
        threads: int = 1,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.options = options or VerifierOptions()
        self.bundle = bundle
        self._judge = Judge.of(bundle)
        self.tee = provider.tee
        self._provider = provider
        self._clock = clock
        self._model = OnnxVerifier()
        self._model.fides_configure(Settings(threads=threads), bundle)
        if bundle.manifest.input is None:
            raise BundleError("The bundle does not describe its input.", "Make it again with `fides fit`.")
        self.input = bundle.manifest.input
        self._signing = Ed25519PrivateKey.generate()
        encryption = X25519PrivateKey.generate()
        self._statement = Statement(
            signing_key=self._signing.public_key().public_bytes_raw(),
            encryption_key=encryption.public_key().public_bytes_raw(),
            bundle_digest=bytes.fromhex(bundle.digest),
            configuration=json.dumps(self._configuration(), sort_keys=True, separators=(",", ":")),
            boot_id=os.urandom(16),
            issued_at=int(clock()),
            challenge=b"",
        )
        self.key_id = self._statement.key_id
        self._nonces = SpentNonces(self.options.nonce_lifetime_s, None if self.options.clients else self.options.nonces)
        self._rate = RateLimit(self.options.rate, self.options.burst)
        self._sequence = itertools.count(1)
        self._evidence = self._make_evidence(b"")

    def _configuration(self) -> dict[str, Any]:
        return {
            "package": __version__,
            "model": self.bundle.manifest.name,
            "bundle_version": self.bundle.manifest.bundle_version,
            "preprocessing": _PREPROCESSING,
            "decimals": self.options.decimals,
            "schemes": sorted(self.options.schemes),
            "clients": sorted(c.hex() for c in self.options.clients),
            "client_set": self.options.client_set,
        }

    def _make_evidence(self, challenge: bytes) -> Evidence:
        statement = replace(self._statement, challenge=challenge, issued_at=int(self._clock()))
        made = self._provider.report(statement.report_data())
        return replace(
            made,
            statement=statement,
            collateral=self.options.collateral,
            vcek=self.options.vcek or made.vcek,
            chain=self.options.chain or made.chain,
        )

    def evidence(self, challenge: bytes = b"") -> Evidence:
        """Evidence for this verifier's keys, made anew where the reader gives a challenge (32 bytes).

        Raises
        ------
        FidesError
            If the challenge has another length, or the hardware fails.
        """
        if not challenge:
            return self._evidence
        if len(challenge) != CHALLENGE_BYTES:
            raise Refusal("request-challenge", f"A challenge has {CHALLENGE_BYTES} bytes.")
        return self._make_evidence(challenge)

    def answer(self, request: str, tensor: NDArray[Any], commitment: str = "") -> SignedAnswer:
        """Run the model on a tensor and sign what came out.

        Parameters
        ----------
        request:
            The client's signed request, as text.
        tensor:
            The input, rows first.
        commitment:
            Digest of the service's output, as text; needed in the scheme "commitment".

        Raises
        ------
        Refusal
            `request-...`, where the request is not answered.
        InputError
            If the model does not take the tensor.
        """
        asked = SignedRequest.decode(request, self.options.clients)
        if asked.scheme not in self.options.schemes:
            raise Refusal("request-scheme", f"This verifier does not offer the scheme {asked.scheme!r}.")
        if asked.key_id != self.key_id:
            raise Refusal(
                "request-evidence", "The request is for another start of this verifier.", "Fetch its evidence again."
            )
        self._judge.check(asked, "request")
        self._check_tensor(tensor)
        # The frame signs the digest, so a host cannot ask about another input in this client's name.
        digest = tensor_digest(tensor)
        if digest != asked.input_digest:
            raise Refusal("request-input", "The tensor is not the one that the client signed for.")
        service_digest = decode_commitment(commitment) if asked.scheme == "commitment" else None
        # Only now does the client pay: whoever repeats or twists its requests must not use up its rate.
        self._nonces.spend(asked.client, asked.nonce, lambda: self._rate.take(asked.client, len(tensor)))
        reference = self._reference(tensor)
        output = reference.tobytes()
        if asked.client_key is not None:
            output = sealing.seal(output, asked.client_key, sealing.context(asked.nonce, digest))
        signed = receipt.Receipt(
            profile=receipt.DEVELOPMENT_PROFILE if self.tee == receipt.DEVELOPMENT_TEE else receipt.PROFILE,
            nonce=asked.nonce,
            session=asked.session,
            input_digest=digest,
            input_dtype=oip_type(tensor.dtype),
            input_shape=tensor.shape,
            preprocessing=_PREPROCESSING,
            scheme=asked.scheme,
            output=output,
            output_dtype=oip_type(reference.dtype),
            output_shape=reference.shape,
            bundle_digest=self._statement.bundle_digest,
            bundle_version=self.bundle.manifest.bundle_version,
            model=self._judge.model,
            classes=self._judge.classes,
            judge=self._judge.judge,
            tee=self.tee,
            boot_id=self._statement.boot_id,
            sequence=next(self._sequence),
            issued_at=int(self._clock()),
            service_digest=service_digest,
        ).sign(self._signing, self.key_id)
        return SignedAnswer(signed, reference if asked.scheme == "commitment" else None)

    def _check_tensor(self, tensor: NDArray[Any]) -> None:
        """Whether the model can take it, as far as the bundle's description of the input tells."""
        wanted = self.input.shape
        fits = tensor.ndim == len(wanted) and all(
            size in (None, given) for size, given in zip(wanted[1:], tensor.shape[1:], strict=True)
        )
        if not fits or tensor.dtype != np.dtype(self.input.dtype):
            shape = ["rows", *("any" if size is None else size for size in wanted[1:])]
            raise InputError(f"The input must be {self.input.dtype} of the shape {shape}.")
        if len(tensor) > self.options.max_rows:
            raise InputError(f"{len(tensor)} rows in one request; at most {self.options.max_rows} are answered.")

    def _reference(self, tensor: NDArray[Any]) -> Float32Array:
        """(N, K) float32; rows that the model could not judge are zero, which no client takes for a distribution."""
        verification = self._model.fides_verify(Query({self.input.name: tensor}))
        reference = np.where(verification.valid[:, None], verification.probabilities, np.float32(0))
        if self.options.decimals is not None:
            reference = round_rows(reference, self.options.decimals)
        return np.ascontiguousarray(reference, dtype="<f4")
