"""Receipts and requests: what is accepted, and that nothing else is."""

from __future__ import annotations

import dataclasses
import os
import random

import cbor2
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given, settings
from hypothesis import strategies as st

from fides_plugins.attestation import cose, sealing
from fides_plugins.attestation.keys import key_id, raw_public
from fides_plugins.attestation.receipt import DEVELOPMENT_PROFILE, PROFILE, open_receipt
from fides_plugins.attestation.refusal import Refusal
from fides_plugins.attestation.request import SignedRequest, decode_commitment, from_text, to_text
from fides_plugins.attestation.tensors import tensor_digest
from fides_plugins.errors import InputError
from tests.support.receipts import mutations, sample_receipt

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
KEY_ID = key_id(raw_public(KEY.public_key()))
KEYS = {KEY_ID: KEY.public_key()}
CLIENT = Ed25519PrivateKey.from_private_bytes(bytes(range(1, 33)))
CLIENT_PUBLIC = raw_public(CLIENT.public_key())


def signed(payload: bytes, context: str = PROFILE) -> bytes:
    return cose.sign(payload, KEY, KEY_ID, context.encode())


def refusal_of(data: bytes, **options: bool) -> str:
    with pytest.raises(Refusal) as caught:
        open_receipt(data, KEYS, **options)
    return caught.value.code


def test_a_receipt_comes_back_as_it_was_signed() -> None:
    receipt = sample_receipt()
    data = receipt.sign(KEY, KEY_ID)
    assert open_receipt(data, KEYS) == dataclasses.replace(receipt, key_id=KEY_ID)
    # Sealed output of ten classes; the reference says about 450 bytes.
    sealed = sealing.seal(bytes(40), raw_public(X25519PrivateKey.generate().public_key()), b"")
    assert 400 <= len(dataclasses.replace(receipt, output=sealed).sign(KEY, KEY_ID)) <= 550


def test_a_receipt_is_plain_cose_sign1() -> None:
    decoded = cbor2.loads(sample_receipt().sign(KEY, KEY_ID))
    assert decoded.tag == 18
    protected, unprotected, payload, signature = decoded.value
    assert cbor2.loads(protected) == {1: -8, 4: KEY_ID}
    assert unprotected == {}
    structure = cbor2.dumps(["Signature1", protected, PROFILE.encode(), payload])
    KEY.public_key().verify(signature, structure)  # raises if the bytes are not RFC 9052's


def test_every_single_byte_matters() -> None:
    data = sample_receipt(service_digest=bytes(32), scheme="commitment").sign(KEY, KEY_ID)
    for position in range(len(data)):
        for flip in (0x01, 0x80, 0xFF):
            changed = bytearray(data)
            changed[position] ^= flip
            assert refusal_of(bytes(changed)).startswith("receipt-")


def test_every_truncation_and_extension_is_refused() -> None:
    data = sample_receipt().sign(KEY, KEY_ID)
    for length in range(len(data)):
        assert refusal_of(data[:length]) in {"receipt-malformed", "receipt-algorithm", "receipt-unprotected"}
    assert refusal_of(data + b"\x00") == "receipt-malformed"
    assert refusal_of(data + data) == "receipt-malformed"


def test_refusals_name_the_check_that_failed() -> None:
    data = sample_receipt().sign(KEY, KEY_ID)
    other = Ed25519PrivateKey.generate()
    assert refusal_of(sample_receipt().sign(other, key_id(raw_public(other.public_key())))) == "receipt-key"
    assert refusal_of(sample_receipt().sign(other, KEY_ID)) == "receipt-signature"
    assert refusal_of(data.replace(b"\xa2\x01\x27", b"\xa2\x01\x26", 1)) == "receipt-algorithm"  # ES256
    at = data.index(KEY_ID) + 32
    assert refusal_of(data[:at] + b"\xa1\x01\x01" + data[at + 1 :]) == "receipt-unprotected"
    assert refusal_of(b"") == "receipt-malformed"
    assert refusal_of(bytes(cose.MAX_FRAME_BYTES + 1)) == "receipt-malformed"
    # The payload's length in three bytes where two would do: same content, another encoding.
    head = data[at + 1 : at + 4]
    assert head[0] == 0x59
    assert refusal_of(data[: at + 1] + b"\x5a\x00\x00" + head[1:] + data[at + 4 :]) == "receipt-malformed"


def test_what_a_trusted_key_signed_must_still_be_strict() -> None:
    good = cbor2.loads(sample_receipt().encode())
    duplicate = cose.encode(good)[:1] + b"\x01\x60" + cose.encode(good)[1:]
    assert refusal_of(signed(bytes((duplicate[0] + 1,)) + duplicate[1:])) == "receipt-encoding"
    assert refusal_of(signed(cose.encode(good) + b"\x00")) == "receipt-encoding"
    assert refusal_of(signed(cbor2.dumps(dict(reversed(good.items()))))) == "receipt-encoding"
    assert refusal_of(signed(cose.encode([1, 2]))) == "receipt-encoding"
    assert refusal_of(signed(bytes.fromhex("d8237828") + b"(" * 40)) == "receipt-encoding"  # a tag that compiles
    assert refusal_of(signed(b"\x9b" + b"\xff" * 8)) == "receipt-encoding"  # 2**64 elements promised
    assert refusal_of(signed(b"\x81" * 5000)) == "receipt-encoding"
    assert refusal_of(signed(cose.encode({**good, 99: 1}))) == "receipt-keys"
    assert refusal_of(signed(cose.encode({**good, "1": 1}))) == "receipt-keys"
    assert refusal_of(signed(cose.encode({k: v for k, v in good.items() if k != 2}))) == "receipt-keys"


@pytest.mark.parametrize(
    "change",
    [
        {"nonce": bytes(31)},
        {"session": "text"},
        {"input_shape": (1, -2)},
        {"input_shape": (True,)},
        {"input_shape": (1,) * 9},
        {"input_dtype": "BYTES"},
        {"bundle_version": True},
        {"sequence": -1},
        {"issued_at": 1.5},
        {"output": "text"},
        {"scheme": "plain"},
        {"scheme": "commitment"},
        {"service_digest": bytes(32)},
        {"service_digest": bytes(31), "scheme": "commitment"},
        {"tee": 7},
        {"preprocessing": "x" * 200},
    ],
)
def test_fields_of_the_wrong_type_are_refused(change: dict[str, object]) -> None:
    receipt = dataclasses.replace(sample_receipt(), **change)  # type: ignore[arg-type]
    assert refusal_of(signed(receipt.encode())) == "receipt-fields"


def test_development_receipts_have_their_own_profile() -> None:
    real = sample_receipt().sign(KEY, KEY_ID)
    development = dataclasses.replace(sample_receipt(), profile=DEVELOPMENT_PROFILE).sign(KEY, KEY_ID)
    assert open_receipt(development, KEYS, development=True).profile == DEVELOPMENT_PROFILE
    # The profile is part of what is signed, so neither passes for the other.
    assert refusal_of(development) == "receipt-signature"
    assert refusal_of(real, development=True) == "receipt-signature"
    relabelled = signed(dataclasses.replace(sample_receipt(), profile=DEVELOPMENT_PROFILE).encode())
    assert refusal_of(relabelled) == "receipt-profile"


@pytest.mark.slow
def test_mutated_receipts_are_never_accepted_and_never_crash() -> None:
    """200,000 mutations, as the issue asks; every one ends as a refusal with a code."""
    codes: dict[str, int] = {}
    originals = [sample_receipt(sequence=i).sign(KEY, KEY_ID) for i in range(8)]
    accepted = set(originals)
    for data in mutations(originals, random.Random(6), 200_000):
        if data in accepted:
            continue
        code = _refusal_or_none(data)
        assert code, f"accepted: {data.hex()}"
        codes[code] = codes.get(code, 0) + 1
    assert sum(codes.values()) > 195_000
    assert {"receipt-malformed", "receipt-algorithm", "receipt-unprotected", "receipt-key", "receipt-signature"} <= set(
        codes
    )


@given(st.binary(max_size=700))
@settings(max_examples=300, deadline=None)
def test_arbitrary_bytes_are_refused(data: bytes) -> None:
    assert refusal_of(data).startswith("receipt-")


@given(st.binary(max_size=600))
@settings(max_examples=500, deadline=None)
def test_arbitrary_payloads_of_a_trusted_key_are_refused(payload: bytes) -> None:
    """Even the signer cannot make the decoder fail in another way than by a refusal."""
    assert refusal_of(signed(payload)) in {"receipt-encoding", "receipt-keys", "receipt-fields"}


_cbor = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.binary(max_size=40) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.integers(-5, 30), inner, max_size=4),
    max_leaves=8,
)


def _refusal_or_none(data: bytes) -> str | None:
    try:
        open_receipt(data, KEYS)
    except Refusal as refusal:
        return refusal.code
    return None


@given(st.sampled_from(range(1, 20)), _cbor)
@settings(max_examples=500, deadline=None)
def test_any_value_in_any_field_is_checked(number: int, value: object) -> None:
    good = cbor2.loads(sample_receipt().encode())
    try:
        data = signed(cose.encode({**good, number: value}))
    except (cbor2.CBOREncodeError, OverflowError):  # not something a signer could write
        return
    if code := _refusal_or_none(data):
        assert code in {"receipt-encoding", "receipt-fields", "receipt-profile"}
    else:
        assert open_receipt(data, KEYS).encode() == cose.encode({**good, number: value})


# Requests


def request(**changes: object) -> SignedRequest:
    values: dict[str, object] = {
        "evidence_id": bytes(32),
        "input_digest": bytes(32),
        "scheme": "hpke",
        "client_key": bytes(range(32)),
    }
    return SignedRequest(**{**values, **changes})  # type: ignore[arg-type]


def refused_request(text: str, allowed: frozenset[bytes] = frozenset()) -> str:
    with pytest.raises(Refusal) as caught:
        SignedRequest.decode(text, allowed)
    return caught.value.code


def test_a_request_comes_back_with_its_signer() -> None:
    sent = request()
    received = SignedRequest.decode(sent.encode(CLIENT), frozenset((CLIENT_PUBLIC,)))
    assert received == dataclasses.replace(sent, client=CLIENT_PUBLIC)
    committed = SignedRequest.decode(request(scheme="commitment", client_key=b"").encode(CLIENT), frozenset())
    assert committed.scheme == "commitment"
    assert sent.nonce != request().nonce


def test_requests_of_others_and_changed_requests_are_refused() -> None:
    text = request().encode(CLIENT)
    assert refused_request(text, frozenset((bytes(32),))) == "request-client"
    data = from_text(text, "request")
    for position in range(len(data)):
        changed = bytearray(data)
        changed[position] ^= 1
        assert refused_request(to_text(bytes(changed))).startswith("request-")
    assert refused_request(text + "=") == "request-malformed"
    assert refused_request("ä" * 20) == "request-malformed"
    assert refused_request("A" * 5000) == "request-malformed"
    assert refused_request(request(scheme="plain").encode(CLIENT)) == "request-fields"
    assert refused_request(request(nonce=bytes(8)).encode(CLIENT)) == "request-fields"
    assert refused_request(request(client_key=b"").encode(CLIENT)) == "request-fields"


def test_a_receipt_is_no_request() -> None:
    frame = cose.sign(sample_receipt().encode(), CLIENT, CLIENT_PUBLIC, PROFILE.encode())
    assert refused_request(to_text(frame)) == "request-signature"


def test_commitments_are_32_bytes_of_text() -> None:
    digest = os.urandom(32)
    assert decode_commitment(to_text(digest)) == digest
    for text in ("", to_text(digest[:31]), to_text(digest) + "A", "*" * 43):
        with pytest.raises(Refusal, match="digest of the service's output"):
            decode_commitment(text)


# Sealing


def test_sealing_follows_rfc_9180() -> None:
    """Vector A.1.1 (base mode, X25519, HKDF-SHA256, AES-128-GCM): a ciphertext made from the vector's own key
    and nonce opens with its private key, so key schedule and framing are the RFC's."""
    info = bytes.fromhex("4f6465206f6e2061204772656369616e2055726e")
    enc = bytes.fromhex("37fda3567bdbd628e88668c3c8d7e97d1d1253b6d4ea6d44c150f741f1bf4431")
    private = bytes.fromhex("4612c550263fc8ad58375df3f557aac531d26850903e55a9f23f21d8534e8ac8")
    public = bytes.fromhex("3948cfe0ad1ddb695d780e59077195da6c56506b027329794ab02bca80815c4d")
    key = AESGCM(bytes.fromhex("4531685d41d65f03dc48f6b8302c05b0"))
    nonce = bytes.fromhex("56d890e5accaaf011cff4b7d")
    plaintext = bytes.fromhex("4265617574792069732074727574682c20747275746820626561757479")
    published = "f938558b5d72f1a23810b4be2ab4f84331acc02fc97babc53a52ae8218a355a96d8770ac83d07bea87e13c512a"
    assert key.encrypt(nonce, plaintext, b"Count-0").hex() == published
    recipient = X25519PrivateKey.from_private_bytes(private)
    assert raw_public(recipient.public_key()) == public
    assert sealing.unseal(enc + key.encrypt(nonce, plaintext, b""), recipient, info) == plaintext


def test_only_the_addressee_opens_and_only_in_its_context() -> None:
    recipient = X25519PrivateKey.generate()
    info = sealing.context(bytes(32), bytes(32))
    sealed = sealing.seal(b"reference", raw_public(recipient.public_key()), info)
    assert len(sealed) == len(b"reference") + sealing.OVERHEAD_BYTES
    assert sealing.unseal(sealed, recipient, info) == b"reference"
    for key, data, where in (
        (X25519PrivateKey.generate(), sealed, info),
        (recipient, sealed[:-1] + bytes((sealed[-1] ^ 1,)), info),
        (recipient, sealed, sealing.context(b"\x01" * 32, bytes(32))),
        (recipient, sealed[:20], info),
    ):
        with pytest.raises(Refusal, match="not sealed to this request's key"):
            sealing.unseal(data, key, where)
    with pytest.raises(Refusal, match="not a usable X25519 key"):
        sealing.seal(b"x", bytes(32), info)


# Tensors


def test_digests_cover_type_shape_and_bytes() -> None:
    array = np.arange(6, dtype=np.float32)
    digests = {
        tensor_digest(array),
        tensor_digest(array.reshape(2, 3)),
        tensor_digest(array.view(np.int32)),
        tensor_digest(array + 1),
    }
    assert len(digests) == 4
    column_major = np.asfortranarray(array.reshape(2, 3))
    assert tensor_digest(column_major) == tensor_digest(array.reshape(2, 3))
    assert tensor_digest(array.astype(">f4")) == tensor_digest(array)


def test_text_has_no_digest() -> None:
    with pytest.raises(InputError, match="not supported"):
        tensor_digest(np.array(["text"], dtype=object))
