"""A sample receipt and an endless supply of broken ones, for unit tests and the fuzzing script."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from fides_plugins.attestation.receipt import PROFILE, Receipt


def sample_receipt(**changes: Any) -> Receipt:
    """A complete receipt for one row of ten classes."""
    values: dict[str, Any] = {
        "profile": PROFILE,
        "nonce": bytes(range(32)),
        "session": bytes(16),
        "input_digest": b"\x11" * 32,
        "input_dtype": "FP32",
        "input_shape": (1, 1, 28, 28),
        "preprocessing": "none",
        "scheme": "hpke",
        "output": np.full(10, 0.1, np.float32).tobytes(),
        "output_dtype": "FP32",
        "output_shape": (1, 10),
        "bundle_digest": b"\x22" * 32,
        "bundle_version": 3,
        "model": "fides",
        "classes": b"\x55" * 32,
        "judge": b"\x66" * 32,
        "tee": "tdx",
        "boot_id": b"\x44" * 16,
        "sequence": 7,
        "issued_at": 1_750_000_000,
        "service_digest": None,
    }
    return Receipt(**{**values, **changes})


def mutations(originals: Sequence[bytes], rng: random.Random, count: int) -> Iterator[bytes]:
    """`count` damaged copies: flipped bits, overwritten, cut, inserted, repeated and spliced pieces."""
    for _ in range(count):
        data = bytearray(rng.choice(originals))
        for _ in range(rng.choice((1, 1, 1, 2, 4))):
            at = rng.randrange(len(data)) if data else 0
            kind = rng.randrange(7)
            if kind == 0 and data:
                data[at] ^= 1 << rng.randrange(8)
            elif kind == 1 and data:
                data[at] = rng.randrange(256)
            elif kind == 2:
                del data[at : at + rng.choice((1, 2, 8, 64))]
            elif kind == 3:
                data[at:at] = rng.randbytes(rng.choice((1, 2, 8)))
            elif kind == 4:
                data[at : at + 8] = rng.randbytes(8)
            elif kind == 5:
                piece = data[at : at + rng.randrange(1, 65)]
                data[at:at] = piece
            else:
                other = rng.choice(originals)
                data[at:] = other[at + rng.randrange(-2, 3) if at > 2 else at :]
        yield bytes(data)
