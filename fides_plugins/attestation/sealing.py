"""Sealing a reference for one client: HPKE base mode (RFC 9180).

The suite is DHKEM(X25519, HKDF-SHA256), HKDF-SHA256, AES-128-GCM (0x0020, 0x0001, 0x0001), from
`cryptography`; the tests check it against the vectors of RFC 9180, appendix A.1. The host passes the
sealed reference on and cannot read it, so it cannot shape a lie to it. `info` binds the ciphertext to the
request it answers, so that it cannot be moved into the receipt of another one.
"""

from __future__ import annotations

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hpke
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from fides_plugins.attestation.refusal import Refusal

_SUITE = hpke.Suite(hpke.KEM.X25519, hpke.KDF.HKDF_SHA256, hpke.AEAD.AES_128_GCM)
_DOMAIN = b"fides-sealed-reference/1"


def context(nonce: bytes, input_digest: bytes) -> bytes:
    """HPKE's `info`: domain tag, nonce (32 bytes) and input digest (32 bytes) of the request."""
    return _DOMAIN + nonce + input_digest


def seal(plaintext: bytes, public_key: bytes, info: bytes) -> bytes:
    """Encrypt to an X25519 public key (32 bytes); the result starts with the encapsulated key.

    Raises
    ------
    Refusal
        `request-client-key`, where the key is not a usable point.
    """
    try:
        return _SUITE.encrypt(plaintext, X25519PublicKey.from_public_bytes(public_key), info)
    except ValueError:
        raise Refusal("request-client-key", "The client's encryption key is not a usable X25519 key.") from None


def unseal(sealed: bytes, private_key: X25519PrivateKey, info: bytes) -> bytes:
    """Decrypt what `seal` made.

    Raises
    ------
    Refusal
        `receipt-sealed`, where key, context or bytes are not the right ones.
    """
    try:
        return _SUITE.decrypt(sealed, private_key, info)
    except (InvalidTag, ValueError):
        raise Refusal("receipt-sealed", "The reference in the receipt is not sealed to this request's key.") from None
