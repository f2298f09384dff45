"""Coverage-guided fuzzing of receipts and requests with atheris, where it installs (Linux x86-64).

    python benchmarks/fuzz_receipts.py --runs 200000
    python benchmarks/fuzz_receipts.py --runs 200000 --target payload

Targets: `receipt` (arbitrary bytes as a receipt), `request` (as a client's request), `payload` (arbitrary
contents under a good signature, the decoder's inside), `body` (HTTP bodies of the verifier), `evidence`
(documents). Nothing may be accepted that differs from what was signed, and nothing may fail in another way
than by a refusal. Exits with 1 on the first input that does.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["fides_plugins.attestation", "fides_plugins.enclave", "fides_plugins.oip"]):
    from fides_plugins.attestation import cose
    from fides_plugins.attestation.evidence import Evidence
    from fides_plugins.attestation.receipt import PROFILE, Receipt, open_receipt
    from fides_plugins.attestation.request import SignedRequest, to_text
    from fides_plugins.enclave import protocol
    from fides_plugins.enclave.bounds import request_bounds

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fides_plugins.attestation.cose import key_id
from fides_plugins.bundle import InputSpec
from fides_plugins.errors import FidesError

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
KEY_ID = key_id(KEY.public_key().public_bytes_raw())
KEYS = {KEY_ID: KEY.public_key()}
SAMPLE = Receipt(
    profile=PROFILE,
    nonce=bytes(range(32)),
    session=bytes(16),
    input_digest=b"\x11" * 32,
    input_dtype="FP32",
    input_shape=(1, 1, 28, 28),
    preprocessing="none",
    scheme="hpke",
    output=bytes(40),
    output_dtype="FP32",
    output_shape=(1, 10),
    bundle_digest=b"\x22" * 32,
    bundle_version=3,
    model="digits",
    classes=b"\x55" * 32,
    judge=b"\x66" * 32,
    tee="tdx",
    boot_id=b"\x44" * 16,
    sequence=7,
    issued_at=1_750_000_000,
    service_digest=None,
)
GOOD = SAMPLE.sign(KEY, KEY_ID)
REQUEST = SignedRequest(
    key_id=bytes(32),
    model="digits",
    classes=bytes(32),
    judge=bytes(32),
    input_digest=bytes(32),
    scheme="hpke",
    client_key=bytes(range(32)),
).encode(KEY)
BOUNDS = request_bounds(InputSpec(name="image", dtype="float32", shape=(None, 1, 28, 28)), 1024)
calls = 0


def receipt(data: bytes) -> None:
    """Arbitrary bytes as a receipt."""
    if open_receipt(data, KEYS) and data != GOOD:
        raise AssertionError(f"accepted {data.hex()}")


def request(data: bytes) -> None:
    """Arbitrary bytes as a client's request; a signature by the client's own key is what it may have."""
    if to_text(data) != REQUEST:
        SignedRequest.decode(to_text(data), frozenset((KEY.public_key().public_bytes_raw(),)))
        raise AssertionError(f"accepted {data.hex()}")


def payload(data: bytes) -> None:
    """Arbitrary contents that a trusted key signed: accepted only in the one deterministic form."""
    opened = open_receipt(cose.sign(data, KEY, KEY_ID, PROFILE.encode()), KEYS)
    if opened.encode() != data:
        raise AssertionError(f"accepted {data.hex()}")


def body(data: bytes) -> None:
    """Arbitrary HTTP bodies; the first two bytes choose the length of the JSON in front."""
    length = int.from_bytes(data[:2], "big")
    protocol.parse_request(data[2:], None if length % 2 else length // 2, BOUNDS)


def evidence(data: bytes) -> None:
    """Arbitrary documents."""
    Evidence.from_json(data)


TARGETS = {f.__name__: f for f in (receipt, request, payload, body, evidence)}
SEEDS = {"receipt": GOOD, "payload": SAMPLE.encode(), "body": b'\x00\x01{"inputs": []}', "evidence": b"{}"}


def main() -> None:
    """Run one target for a bounded number of inputs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200_000)
    parser.add_argument("--target", choices=sorted(TARGETS), default="receipt")
    parser.add_argument("--corpus", type=Path, help="folder of seeds; default: a temporary one with a good message")
    options = parser.parse_args()
    target = TARGETS[options.target]

    def one(data: bytes) -> None:
        global calls
        calls += 1
        try:
            target(data)
        except FidesError:
            return

    import tempfile

    folder = options.corpus or Path(tempfile.mkdtemp(prefix="fides-fuzz-"))
    folder.mkdir(exist_ok=True)
    if options.target in SEEDS:
        (folder / "good").write_bytes(SEEDS[options.target])
    atheris.Setup(
        [sys.argv[0], f"-runs={options.runs}", "-max_len=1200", "-verbosity=0", "-print_final_stats=1", str(folder)],
        one,
    )
    atheris.Fuzz()


if __name__ == "__main__":
    main()
