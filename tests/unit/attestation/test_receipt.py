"""Receipts: what is accepted, and that nothing else is."""

from __future__ import annotations

import dataclasses
import random

import cbor2
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from fides_plugins.attestation import cose, sealing
from fides_plugins.attestation.cose import key_id
from fides_plugins.attestation.receipt import DEVELOPMENT_PROFILE, PROFILE, open_receipt
from fides_plugins.attestation.refusal import Refusal
from tests.support.receipts import mutations, sample_receipt

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
KEY_ID = key_id(KEY.public_key().public_bytes_raw())
KEYS = {KEY_ID: KEY.public_key()}


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
    # Sealed output of ten classes.
    sealed = sealing.seal(bytes(40), X25519PrivateKey.generate().public_key().public_bytes_raw(), b"")
    assert 450 <= len(dataclasses.replace(receipt, output=sealed).sign(KEY, KEY_ID)) <= 600


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
    assert refusal_of(sample_receipt().sign(other, key_id(other.public_key().public_bytes_raw()))) == "receipt-key"
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


FIELDS = cbor2.loads(sample_receipt().encode())
PAYLOAD = cose.encode(FIELDS)


@pytest.mark.parametrize(
    ("payload", "code"),
    [
        pytest.param(bytes((PAYLOAD[0] + 1,)) + b"\x01\x60" + PAYLOAD[1:], "receipt-encoding", id="a key twice"),
        pytest.param(PAYLOAD + b"\x00", "receipt-encoding", id="a byte too many"),
        pytest.param(cbor2.dumps(dict(reversed(FIELDS.items()))), "receipt-encoding", id="another order"),
        pytest.param(cose.encode([1, 2]), "receipt-encoding", id="a list"),
        pytest.param(bytes.fromhex("d8237828") + b"(" * 40, "receipt-encoding", id="a tag that compiles"),
        pytest.param(b"\x9b" + b"\xff" * 8, "receipt-encoding", id="2**64 elements promised"),
        pytest.param(b"\x81" * 5000, "receipt-encoding", id="5000 lists in each other"),
        pytest.param(cose.encode({**FIELDS, 99: 1}), "receipt-keys", id="an unknown key"),
        pytest.param(cose.encode({**FIELDS, "1": 1}), "receipt-keys", id="a key of text"),
        pytest.param(cose.encode({k: v for k, v in FIELDS.items() if k != 2}), "receipt-keys", id="a missing key"),
    ],
)
def test_what_a_trusted_key_signed_must_still_be_strict(payload: bytes, code: str) -> None:
    assert refusal_of(signed(payload)) == code


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
    try:
        data = signed(cose.encode({**FIELDS, number: value}))
    except (cbor2.CBOREncodeError, OverflowError):  # not something a signer could write
        return
    if code := _refusal_or_none(data):
        assert code in {"receipt-encoding", "receipt-fields", "receipt-profile"}
    else:
        assert open_receipt(data, KEYS).encode() == cose.encode({**FIELDS, number: value})
