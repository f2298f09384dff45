"""Sealed references: by the standard's vector, and opened by nobody but the addressee."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from fides_plugins.attestation import sealing
from fides_plugins.attestation.refusal import Refusal


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
    assert recipient.public_key().public_bytes_raw() == public
    assert sealing.unseal(enc + key.encrypt(nonce, plaintext, b""), recipient, info) == plaintext


RECIPIENT = X25519PrivateKey.generate()
INFO = sealing.context(bytes(32), bytes(32))
SEALED = sealing.seal(b"reference", RECIPIENT.public_key().public_bytes_raw(), INFO)


def test_the_addressee_opens_in_the_context_it_was_sealed_for() -> None:
    assert len(SEALED) == len(b"reference") + 32 + 16  # the encapsulated key and the tag
    assert sealing.unseal(SEALED, RECIPIENT, INFO) == b"reference"


@pytest.mark.parametrize(
    ("data", "key", "info"),
    [
        pytest.param(SEALED, X25519PrivateKey.generate(), INFO, id="another key"),
        pytest.param(SEALED[:-1] + bytes((SEALED[-1] ^ 1,)), RECIPIENT, INFO, id="another byte"),
        pytest.param(SEALED, RECIPIENT, sealing.context(b"\x01" * 32, bytes(32)), id="another context"),
        pytest.param(SEALED[:20], RECIPIENT, INFO, id="cut off"),
    ],
)
def test_nothing_else_opens(data: bytes, key: X25519PrivateKey, info: bytes) -> None:
    with pytest.raises(Refusal, match="not sealed to this request's key"):
        sealing.unseal(data, key, info)


def test_a_key_that_is_none_is_refused() -> None:
    with pytest.raises(Refusal, match="not a usable X25519 key"):
        sealing.seal(b"x", bytes(32), INFO)
