"""Identifiers of public keys, and their raw form."""

from __future__ import annotations

import hashlib

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey


def raw_public(key: Ed25519PublicKey | X25519PublicKey) -> bytes:
    """The 32 bytes of a public key."""
    return key.public_bytes_raw()


def key_id(public_key: bytes) -> bytes:
    """SHA-256 over a domain tag and the raw public key; 32 bytes."""
    return hashlib.sha256(b"fides-key/1" + public_key).digest()
