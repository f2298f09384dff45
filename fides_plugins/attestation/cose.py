"""COSE_Sign1 (RFC 9052) in the one form that this package writes and accepts.

    18([ << {1: -8, 4: h'key id, 32 bytes'} >>, {}, h'payload', h'Ed25519 signature' ])

The frame is compared byte by byte instead of being decoded, so no CBOR decoder ever sees bytes that are
not signed by a known key: decoders accept duplicate keys, trailing bytes and tags with side effects.
After the signature, the payload must be the deterministic encoding (RFC 8949, 4.2.1) of what it decodes
to, which excludes all of these.
"""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass, fields
from typing import Annotated, Any, Generic, TypeVar

import cbor2
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import BeforeValidator, Field, Strict, TypeAdapter, ValidationError

from fides_plugins.attestation.refusal import Refusal

T = TypeVar("T")


def as_tuple(value: Any) -> Any:
    """A list of the wire, as the tuple that messages hold."""
    return tuple(value) if type(value) is list else value


# What the fields of a message are; `bool` does not count as an integer, and a shape travels as a list.
Text = Annotated[str, Strict(), Field(max_length=128)]
Bytes = Annotated[bytes, Strict()]
Bytes16 = Annotated[Bytes, Field(min_length=16, max_length=16)]
Bytes32 = Annotated[Bytes, Field(min_length=32, max_length=32)]
Count = Annotated[int, Strict(), Field(ge=0, lt=1 << 64)]
Shape = Annotated[tuple[Count, ...], Strict(), Field(max_length=8), BeforeValidator(as_tuple)]

#: Nothing this package signs is larger; a larger frame is refused before anything is done with it.
MAX_FRAME_BYTES = 1 << 20
KEY_ID_BYTES = 32
_SIGNATURE_BYTES = 64
_TAG_AND_ARRAY = b"\xd2\x84"  # tag 18, array of 4
_PROTECTED_HEAD = b"\xa2\x01\x27\x04\x58\x20"  # {1: -8 (EdDSA), 4: bytes(32)}
_PROTECTED_BYTES = len(_PROTECTED_HEAD) + KEY_ID_BYTES
_FRAME_HEAD = _TAG_AND_ARRAY + bytes((0x58, _PROTECTED_BYTES))
_EMPTY_MAP = b"\xa0"
_SIGNATURE_HEAD = bytes((0x58, _SIGNATURE_BYTES))
_TAIL_BYTES = len(_SIGNATURE_HEAD) + _SIGNATURE_BYTES
#: Bytes in front of a byte string, for lengths below 24, 2**8, 2**16 and 2**32.
_LENGTHS_OF_HEADS = (1, 2, 3, 5)


@dataclass(frozen=True)
class Frame:
    """A COSE_Sign1 whose form was checked and whose signature was not: trust nothing in it yet."""

    key_id: bytes
    payload: bytes
    signature: bytes


def key_id(public_key: bytes) -> bytes:
    """SHA-256 over a domain tag and a raw public key; 32 bytes."""
    return hashlib.sha256(b"fides-key/1" + public_key).digest()


def encode(value: Any) -> bytes:
    """Deterministic CBOR (RFC 8949, 4.2.1)."""
    return cbor2.dumps(value, canonical=True)


def _to_be_signed(key_id: bytes, payload: bytes, context: bytes) -> bytes:
    """Sig_structure of RFC 9052, 4.4; `context` is its external_aad and keeps the kinds of message apart."""
    return encode(["Signature1", _PROTECTED_HEAD + key_id, context, payload])


def sign(payload: bytes, key: Ed25519PrivateKey, key_id: bytes, context: bytes) -> bytes:
    """The signed frame over `payload`."""
    signature = key.sign(_to_be_signed(key_id, payload, context))
    return _FRAME_HEAD + _PROTECTED_HEAD + key_id + _EMPTY_MAP + encode(payload) + _SIGNATURE_HEAD + signature


def parse(data: bytes, what: str) -> Frame:
    """Take a frame apart without trusting it.

    Parameters
    ----------
    data:
        The received bytes.
    what:
        "receipt" or "request": the first word of every refusal's code.

    Raises
    ------
    Refusal
        `<what>-malformed`, `<what>-algorithm` or `<what>-unprotected`.
    """

    def refuse(detail: str) -> Refusal:
        return Refusal(f"{what}-malformed", f"The {what} is no signed frame of this package: {detail}.")

    if len(data) > MAX_FRAME_BYTES:
        raise refuse("it is too long")
    if not data.startswith(_FRAME_HEAD):
        raise refuse("its first bytes differ")
    position = len(_FRAME_HEAD)
    protected = data[position : position + _PROTECTED_BYTES]
    if not protected.startswith(_PROTECTED_HEAD) or len(protected) != _PROTECTED_BYTES:
        raise Refusal(f"{what}-algorithm", f"The {what} is not signed with EdDSA, or has other protected headers.")
    position += _PROTECTED_BYTES
    if data[position : position + 1] != _EMPTY_MAP:
        raise Refusal(f"{what}-unprotected", f"The {what} has headers that its signature does not cover.")
    body, tail = data[position + 1 : -_TAIL_BYTES], data[-_TAIL_BYTES:]
    # The payload is what encodes to these bytes: that also refuses lengths that are not written in the shortest form.
    payload = next((body[n:] for n in _LENGTHS_OF_HEADS if encode(body[n:]) == body), None)
    if payload is None or not tail.startswith(_SIGNATURE_HEAD):
        raise refuse("it is not one payload with one signature behind it")
    return Frame(protected[len(_PROTECTED_HEAD) :], payload, tail[len(_SIGNATURE_HEAD) :])


def verify(frame: Frame, key: Ed25519PublicKey, context: bytes, what: str) -> None:
    """Check the signature over the raw payload.

    Raises
    ------
    Refusal
        `<what>-signature`.
    """
    try:
        key.verify(frame.signature, _to_be_signed(frame.key_id, frame.payload, context))
    except InvalidSignature:
        raise Refusal(f"{what}-signature", f"The signature of the {what} is wrong: its bytes were changed.") from None


class Payload(Generic[T]):
    """How one kind of message is written and read as a deterministic CBOR map.

    Parameters
    ----------
    kind:
        A dataclass whose annotations pydantic checks. A field's number on the wire is its place; the last one stays
        behind, and becomes the frame's key id when a message is read.
    what:
        "receipt", "request" and so on.
    optional:
        The one field that may be None, and is then left out; most have none.
    """

    def __init__(self, kind: type[T], what: str, optional: str = "") -> None:
        *sent, self._signer = (field.name for field in fields(kind))  # type: ignore[arg-type]
        self._numbers = {name: number for number, name in enumerate(sent, start=1)}
        self._required = {number for name, number in self._numbers.items() if name != optional}
        self._reader = TypeAdapter(kind)
        self._what = what

    def encode(self, message: T) -> bytes:
        """The payload."""
        values = {number: getattr(message, name) for name, number in self._numbers.items()}
        return encode({n: list(v) if isinstance(v, tuple) else v for n, v in values.items() if v is not None})

    def decode(self, frame: Frame) -> T:
        """The message in a frame whose signature was verified; every field must have exactly its type.

        Raises
        ------
        Refusal
            `<what>-encoding`, `<what>-keys`, `<what>-fields`.
        """
        try:
            value = cbor2.loads(frame.payload)
            same = isinstance(value, dict) and hmac.compare_digest(encode(value), frame.payload)
        # cbor2's decoders of tagged values raise many kinds of error; the signer is known, the bytes are not ours.
        except Exception:
            same = False
        if not same:
            problem = f"The payload of the {self._what} is not deterministic CBOR of one map."
            raise Refusal(f"{self._what}-encoding", problem)
        if not self._required <= {k if type(k) is int else None for k in value} <= set(self._numbers.values()):
            problem = f"The {self._what} has missing or unknown fields."
            raise Refusal(f"{self._what}-keys", problem, "Update this package on both sides.")
        named = {name: value[number] for name, number in self._numbers.items() if number in value}
        for name in named:
            if named[name] is None:
                raise self.wrong(name)
        try:
            return self._reader.validate_python({**named, self._signer: frame.key_id})
        except ValidationError as error:
            raise self.wrong(str(error.errors()[0]["loc"][0])) from None

    def wrong(self, name: str) -> Refusal:
        """The refusal of a message with such a field."""
        return Refusal(f"{self._what}-fields", f"Field `{name}` of the {self._what} has the wrong type or length.")
