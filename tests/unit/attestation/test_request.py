"""Clients' signed requests and the commitments beside them: what is accepted, and that nothing else is."""

from __future__ import annotations

import dataclasses
import os

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fides_plugins.attestation import cose
from fides_plugins.attestation.receipt import PROFILE
from fides_plugins.attestation.refusal import Refusal
from fides_plugins.attestation.request import SignedRequest, decode_commitment, from_text, to_text
from tests.support.receipts import sample_receipt

CLIENT = Ed25519PrivateKey.from_private_bytes(bytes(range(1, 33)))
CLIENT_PUBLIC = CLIENT.public_key().public_bytes_raw()


def request(**changes: object) -> SignedRequest:
    values: dict[str, object] = {
        "key_id": bytes(32),
        "model": "fides",
        "classes": bytes(32),
        "judge": bytes(32),
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
    committed = SignedRequest.decode(request(scheme="commitment", client_key=None).encode(CLIENT), frozenset())
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


@pytest.mark.parametrize("text", [request().encode(CLIENT) + "=", "ä" * 20, "A" * 5000])
def test_a_text_that_is_no_request_is_malformed(text: str) -> None:
    assert refused_request(text) == "request-malformed"


@pytest.mark.parametrize(
    "change",
    [{"scheme": "plain"}, {"nonce": bytes(8)}, {"client_key": b""}, {"client_key": None}, {"scheme": "commitment"}],
)
def test_what_a_client_signed_must_still_be_a_request(change: dict[str, object]) -> None:
    assert refused_request(request(**change).encode(CLIENT)) == "request-fields"


def test_a_receipt_is_no_request() -> None:
    frame = cose.sign(sample_receipt().encode(), CLIENT, CLIENT_PUBLIC, PROFILE.encode())
    assert refused_request(to_text(frame)) == "request-signature"


def test_commitments_are_32_bytes_of_text() -> None:
    digest = os.urandom(32)
    assert decode_commitment(to_text(digest)) == digest


@pytest.mark.parametrize("text", ["", to_text(bytes(31)), to_text(bytes(32)) + "A", "*" * 43])
def test_a_text_that_is_no_digest_commits_to_nothing(text: str) -> None:
    with pytest.raises(Refusal, match="digest of the service's output"):
        decode_commitment(text)
