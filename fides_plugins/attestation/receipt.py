"""Receipts: what an enclave saw and answered, signed.

A COSE_Sign1 (see `cose`) with Ed25519 over a deterministic CBOR map. The profile is close to the IETF
individual draft "attested inference receipt". Receipts of development verifiers have a profile of their
own, so that neither side can take one for the other.
"""

from __future__ import annotations

from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fides_plugins.attestation import cose
from fides_plugins.attestation.cose import Bytes, Bytes16, Bytes32, Count, Shape, Text
from fides_plugins.attestation.refusal import Refusal
from fides_plugins.oip import OIP_TYPES

PROFILE = "fides-receipt/1"
DEVELOPMENT_PROFILE = "fides-receipt/1+development"
DEVELOPMENT_TEE = "development"


@dataclass(frozen=True)
class Receipt:
    """The contents of a receipt. A field's number on the wire is its place here; `key_id` stays behind.

    Attributes
    ----------
    profile:
        `PROFILE`, or `DEVELOPMENT_PROFILE` for evidence without hardware.
    nonce, session:
        From the client's request; 32 and 16 bytes.
    input_digest, input_dtype, input_shape, preprocessing:
        The input that the enclave saw: digest (32 bytes), its type's name, its shape, and the id of what
        the enclave did to it before the model.
    scheme:
        "hpke" or "commitment".
    output, output_dtype, output_shape:
        The reference distribution: bytes of the tensor, sealed in the scheme "hpke", and what they hold.
    bundle_digest, bundle_version:
        The bundle that answered; 32 bytes and an integer.
    model, classes, judge:
        What the answer may be judged by: see `Judge`.
    tee, boot_id:
        The kind of TEE, and the start (16 bytes), whose evidence vouches for the key.
    sequence:
        Number of the receipt since that start.
    issued_at:
        Seconds since 1970 by the host's clock: advisory, never a reason to trust.
    service_digest:
        Digest of the service's output that the host committed to (32 bytes), or None.
    key_id:
        Key that signed; filled in by `open_receipt`.
    """

    profile: Text
    nonce: Bytes32
    session: Bytes16
    input_digest: Bytes32
    input_dtype: Text
    input_shape: Shape
    preprocessing: Text
    scheme: Text
    output: Bytes
    output_dtype: Text
    output_shape: Shape
    bundle_digest: Bytes32
    bundle_version: Count
    model: Text
    classes: Bytes32
    judge: Bytes32
    tee: Text
    boot_id: Bytes16
    sequence: Count
    issued_at: Count
    service_digest: Bytes32 | None = None
    key_id: Bytes = b""

    def encode(self) -> bytes:
        """The payload: deterministic CBOR."""
        return _PAYLOAD.encode(self)

    def sign(self, key: Ed25519PrivateKey, key_id: bytes) -> bytes:
        """The signed receipt, about 550 bytes for a single row of ten classes."""
        return cose.sign(self.encode(), key, key_id, self.profile.encode("ascii"))


_PAYLOAD = cose.Payload(Receipt, "receipt", optional="service_digest")


def open_receipt(data: bytes, keys: dict[bytes, Ed25519PublicKey], development: bool = False) -> Receipt:
    """Check a receipt's signature against known keys and decode it strictly.

    Parameters
    ----------
    data:
        The received bytes.
    keys:
        Public keys by key id, of verifiers whose evidence was trusted.
    development:
        Expect the profile of development verifiers instead of the real one.

    Raises
    ------
    Refusal
        With the code of the first check that failed: `receipt-malformed`, `receipt-algorithm`,
        `receipt-unprotected`, `receipt-key`, `receipt-signature`, `receipt-encoding`, `receipt-keys`,
        `receipt-fields` or `receipt-profile`.
    """
    frame = cose.parse(data, "receipt")
    key = keys.get(frame.key_id)
    if key is None:
        raise Refusal("receipt-key", "The receipt is signed by a key that no trusted evidence vouches for.")
    profile = DEVELOPMENT_PROFILE if development else PROFILE
    cose.verify(frame, key, profile.encode("ascii"), "receipt")
    receipt = _PAYLOAD.decode(frame)
    for name in ("input_dtype", "output_dtype"):
        if getattr(receipt, name) not in OIP_TYPES:
            raise _PAYLOAD.wrong(name)
    if receipt.scheme != ("hpke" if receipt.service_digest is None else "commitment"):
        raise _PAYLOAD.wrong("scheme")
    if receipt.profile != profile:
        raise Refusal("receipt-profile", f"The receipt's profile is not {profile}.")
    return receipt
