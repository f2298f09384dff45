"""What a client asks of a verifier: one signed string that travels with the inference request.

It goes through the untrusted host as the parameter `fides_request` (Triton, Open Inference Protocol) or
the header `X-Fides-Request` (TorchServe), base64url without padding. The client signs it, because a host
that could ask the verifier in its own name would learn every reference and shape its lie to it: a
verifier with a list of clients answers only those. It names the key that the checked evidence vouches for, so
that it cannot be replayed to an enclave that was started again.
"""

from __future__ import annotations

import base64
import binascii
import os
from dataclasses import dataclass, field
from typing import Literal

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fides_plugins.attestation import cose
from fides_plugins.attestation.cose import Bytes, Bytes16, Bytes32, Text
from fides_plugins.attestation.refusal import Refusal
from fides_plugins.attestation.wire import COMMITMENT_PARAMETER

#: "hpke": the reference is sealed to `client_key`. "commitment": it is readable, and the receipt carries
#: the digest of the service's output, which the host must give before the enclave answers.
Scheme = Literal["hpke", "commitment"]

PROFILE = "fides-request/1"

NONCE_BYTES = 32
SESSION_BYTES = 16
_DIGEST_BYTES = 32
#: A request is about 400 bytes and its model's name; anything much longer is not one.
_MAX_TEXT = 2048


def to_text(data: bytes) -> str:
    """base64url without padding: how requests, receipts and digests travel as text."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii")


def from_text(text: str, what: str, limit: int = cose.MAX_FRAME_BYTES * 2) -> bytes:
    """The bytes of `to_text`.

    Raises
    ------
    Refusal
        `<what>-malformed`, also for text that is not the one form that `to_text` gives.
    """
    try:
        if len(text) > limit:
            raise ValueError("too long")
        data = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except (ValueError, binascii.Error):
        data = None
    if data is None or to_text(data) != text:
        raise Refusal(f"{what}-malformed", f"The {what} is not base64url text of the expected length.")
    return data


@dataclass(frozen=True, kw_only=True)
class SignedRequest:
    """One request to a verifier. A field's number on the wire is its place here; `client` stays behind.

    Attributes
    ----------
    profile:
        `PROFILE`.
    nonce, session:
        32 and 16 random bytes; the nonce is used once, the session is the client object's.
    key_id:
        The key (32 bytes) that the client expects receipts of: a verifier's, and of one start of it.
    model, classes, judge:
        What the client judges by: see `Judge`.
    input_digest:
        `tensor_digest` of the input (32 bytes).
    scheme:
        How the reference is kept from shaping the host's lie.
    client_key:
        X25519 public key (32 bytes) for the scheme "hpke"; None otherwise.
    client:
        Ed25519 public key (32 bytes) that signed; filled in by `decode`.
    """

    profile: Text = PROFILE
    nonce: Bytes32 = field(default_factory=lambda: os.urandom(NONCE_BYTES))
    session: Bytes16 = bytes(SESSION_BYTES)
    key_id: Bytes32
    model: Text
    classes: Bytes32
    judge: Bytes32
    input_digest: Bytes32
    scheme: Scheme
    client_key: Bytes32 | None = None
    client: Bytes = b""

    def encode(self, identity: Ed25519PrivateKey) -> str:
        """The signed text; the key id of the frame is the client's public key itself."""
        signer = identity.public_key().public_bytes_raw()
        return to_text(cose.sign(_PAYLOAD.encode(self), identity, signer, PROFILE.encode()))

    @classmethod
    def decode(cls, text: str, allowed: frozenset[bytes]) -> SignedRequest:
        """Check and decode a received request.

        Parameters
        ----------
        text:
            Value of `fides_request`.
        allowed:
            Public keys of the clients that may ask; empty: anybody.

        Raises
        ------
        Refusal
            `request-malformed`, `request-client`, `request-signature`, `request-fields` and the others of
            `cose`.
        """
        frame = cose.parse(from_text(text, "request", _MAX_TEXT), "request")
        if allowed and frame.key_id not in allowed:
            raise Refusal("request-client", "This verifier does not answer this client.")
        try:
            key = Ed25519PublicKey.from_public_bytes(frame.key_id)
        except ValueError:
            raise Refusal("request-client", "The client's identity is not an Ed25519 key.") from None
        cose.verify(frame, key, PROFILE.encode(), "request")
        request = _PAYLOAD.decode(frame)
        if request.profile != PROFILE:
            raise Refusal("request-profile", f"The request's profile is not {PROFILE}.")
        if (request.scheme == "hpke") != (request.client_key is not None):
            raise _PAYLOAD.wrong("client_key")
        return request


_PAYLOAD = cose.Payload(SignedRequest, "request", optional="client_key")


def decode_commitment(text: str) -> bytes:
    """The service output's digest that the host commits to (32 bytes), from its text.

    Raises
    ------
    Refusal
        `request-commitment`.
    """
    try:
        digest = from_text(text, "request", _MAX_TEXT)
    except Refusal:
        digest = b""
    if len(digest) != _DIGEST_BYTES:
        raise Refusal(
            "request-commitment",
            "The scheme `commitment` needs the digest of the service's output before the verifier answers.",
            f"Send it as {COMMITMENT_PARAMETER}, base64url of 32 bytes.",
        )
    return digest
