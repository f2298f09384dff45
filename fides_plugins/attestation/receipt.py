"""Receipts: what an enclave saw and answered, signed.

A COSE_Sign1 (see `cose`) with Ed25519 over a deterministic CBOR map. The profile is close to the IETF
individual draft "attested inference receipt". Receipts of development verifiers have a profile of their
own, so that neither side can take one for the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fides_plugins.attestation import cose
from fides_plugins.attestation.refusal import Refusal
from fides_plugins.oip import OIP_TYPES

PROFILE = "fides-receipt/1"
DEVELOPMENT_PROFILE = "fides-receipt/1+development"
DEVELOPMENT_TEE = "development"

_MAX_RANK = 8
_MAX_UINT = (1 << 64) - 1

_BYTES = {"nonce": 32, "session": 16, "input_digest": 32, "bundle_digest": 32, "evidence_id": 32, "boot_id": 16}
_FIELDS = (
    "profile",
    "nonce",
    "session",
    "input_digest",
    "input_dtype",
    "input_shape",
    "preprocessing",
    "scheme",
    "output",
    "output_dtype",
    "output_shape",
    "bundle_digest",
    "bundle_version",
    "evidence_id",
    "tee",
    "boot_id",
    "sequence",
    "issued_at",
    "service_digest",
)
_NUMBER = {name: i for i, name in enumerate(_FIELDS, start=1)}
_OPTIONAL = frozenset((_NUMBER["service_digest"],))
_REQUIRED = frozenset(_NUMBER.values()) - _OPTIONAL


@dataclass(frozen=True)
class Receipt:
    """The contents of a receipt.

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

    profile: str
    nonce: bytes
    session: bytes
    input_digest: bytes
    input_dtype: str
    input_shape: tuple[int, ...]
    preprocessing: str
    scheme: str
    output: bytes
    output_dtype: str
    output_shape: tuple[int, ...]
    bundle_digest: bytes
    bundle_version: int
    evidence_id: bytes
    tee: str
    boot_id: bytes
    sequence: int
    issued_at: int
    service_digest: bytes | None = None
    key_id: bytes = b""

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
        return cose.sign(self.encode(), key, key_id, _context(self.profile))


def _context(profile: str) -> bytes:
    return profile.encode("ascii")


def _check(values: dict[str, Any]) -> None:
    """Every field has exactly its type; `bool` is no integer here."""

    def refuse(name: str) -> Refusal:
        return Refusal("receipt-fields", f"Field `{name}` of the receipt has the wrong type or length.")

    for name in ("profile", "input_dtype", "preprocessing", "scheme", "output_dtype", "tee"):
        if type(values[name]) is not str or len(values[name]) > 128:
            raise refuse(name)
    for name, length in _BYTES.items():
        if type(values[name]) is not bytes or len(values[name]) != length:
            raise refuse(name)
    for name in ("bundle_version", "sequence", "issued_at"):
        if type(values[name]) is not int or not 0 <= values[name] <= _MAX_UINT:
            raise refuse(name)
    for name in ("input_shape", "output_shape"):
        shape = values[name]
        if type(shape) is not list or len(shape) > _MAX_RANK:
            raise refuse(name)
        if any(type(d) is not int or not 0 <= d <= _MAX_UINT for d in shape):
            raise refuse(name)
    for name in ("input_dtype", "output_dtype"):
        if values[name] not in OIP_TYPES:
            raise refuse(name)
    if type(values["output"]) is not bytes:
        raise refuse("output")
    committed = "service_digest" in values
    if committed and (type(values["service_digest"]) is not bytes or len(values["service_digest"]) != 32):
        raise refuse("service_digest")
    if values["scheme"] != ("commitment" if committed else "hpke"):
        raise refuse("scheme")


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
    cose.verify(frame, key, _context(profile), "receipt")
    numbered = cose.decode_map(frame.payload, _REQUIRED, _OPTIONAL, "receipt")
    values = {name: numbered[number] for name, number in _NUMBER.items() if number in numbered}
    _check(values)
    if values["profile"] != profile:
        raise Refusal("receipt-profile", f"The receipt's profile is not {profile}.")
    values["input_shape"] = tuple(values["input_shape"])
    values["output_shape"] = tuple(values["output_shape"])
    return Receipt(key_id=frame.key_id, **values)
