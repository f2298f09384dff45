"""Identifiers of public keys."""

from __future__ import annotations

import hashlib


def key_id(public_key: bytes) -> bytes:
    """SHA-256 over a domain tag and the raw public key; 32 bytes."""
    return hashlib.sha256(b"fides-key/1" + public_key).digest()
