"""Receipts: what an enclave saw and answered, signed.

A COSE_Sign1 (see `cose`) with Ed25519 over a deterministic CBOR map. The profile is close to the IETF
individual draft "attested inference receipt". Receipts of development verifiers have a profile of their
own, so that neither side can take one for the other.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated, Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import Field, Strict, TypeAdapter, ValidationError

from fides_plugins.attestation import cose
from fides_plugins.attestation.refusal import Refusal
from fides_plugins.oip import OIP_TYPES

PROFILE = "fides-receipt/1"
DEVELOPMENT_PROFILE = "fides-receipt/1+development"
DEVELOPMENT_TEE = "development"

_Text = Annotated[str, Strict(), Field(max_length=128)]
_Bytes = Annotated[bytes, Strict()]
_Bytes16 = Annotated[_Bytes, Field(min_length=16, max_length=16)]
_Bytes32 = Annotated[_Bytes, Field(min_length=32, max_length=32)]
_Count = Annotated[int, Strict(), Field(ge=0, lt=1 << 64)]
_Shape = Annotated[tuple[_Count, ...], Strict(), Field(max_length=8)]


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
    evidence_id, tee, boot_id:
        Which evidence the key is bound to (32 bytes), the kind of TEE, and the start (16 bytes).
    sequence:
        Number of the receipt since that start.
    issued_at:
        Seconds since 1970 by the host's clock: advisory, never a reason to trust.
    service_digest:
        Digest of the service's output that the host committed to (32 bytes), or None.
    key_id:
        Key that signed; filled in by `open_receipt`.
    """

    profile: _Text
    nonce: _Bytes32
    session: _Bytes16
    input_digest: _Bytes32
    input_dtype: _Text
    input_shape: _Shape
    preprocessing: _Text
    scheme: _Text
    output: _Bytes
    output_dtype: _Text
    output_shape: _Shape
    bundle_digest: _Bytes32
    bundle_version: _Count
    evidence_id: _Bytes32
    tee: _Text
    boot_id: _Bytes16
    sequence: _Count
    issued_at: _Count
    service_digest: _Bytes32 | None = None
    key_id: _Bytes = b""

    def encode(self) -> bytes:
        """The payload: deterministic CBOR."""
        values: dict[int, Any] = {}
        for name, number in _NUMBER.items():
            value = getattr(self, name)
            if value is not None:
                values[number] = list(value) if isinstance(value, tuple) else value
        return cose.encode(values)

    def sign(self, key: Ed25519PrivateKey, key_id: bytes) -> bytes:
        """The signed receipt, about 450 bytes for a single row of ten classes."""
        return cose.sign(self.encode(), key, key_id, self.profile.encode("ascii"))


_NUMBER = {field.name: number for number, field in enumerate(fields(Receipt)[:-1], start=1)}
_OPTIONAL = frozenset((_NUMBER["service_digest"],))
_REQUIRED = frozenset(_NUMBER.values()) - _OPTIONAL
_READER = TypeAdapter(Receipt)


def _read(values: dict[str, Any]) -> Receipt:
    """Every field has exactly its type; `bool` does not count as an integer."""
    try:
        receipt = _READER.validate_python({k: tuple(v) if type(v) is list else v for k, v in values.items()})
    except ValidationError as error:
        raise _wrong(str(error.errors()[0]["loc"][0])) from None
    for name in ("input_dtype", "output_dtype"):
        if values[name] not in OIP_TYPES:
            raise _wrong(name)
    if "service_digest" in values and receipt.service_digest is None:
        raise _wrong("service_digest")
    if receipt.scheme != ("hpke" if receipt.service_digest is None else "commitment"):
        raise _wrong("scheme")
    return receipt


def _wrong(name: str) -> Refusal:
    return Refusal("receipt-fields", f"Field `{name}` of the receipt has the wrong type or length.")


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
    numbered = cose.decode_map(frame.payload, _REQUIRED, _OPTIONAL, "receipt")
    values = {name: numbered[number] for name, number in _NUMBER.items() if number in numbered}
    receipt = _read({**values, "key_id": frame.key_id})
    if receipt.profile != profile:
        raise Refusal("receipt-profile", f"The receipt's profile is not {profile}.")
    return receipt
