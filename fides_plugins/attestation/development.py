"""Evidence without hardware, for development and tests. It proves nothing.

The root's private key is derived from a public constant, so everybody can forge such evidence. It has its
own report format and root, and receipts under it their own profile; only a call or a command line that
says so in as many words accepts it.
"""

from __future__ import annotations

import hashlib

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fides_plugins.attestation.evidence import REPORT_DATA_BYTES, ReportFacts
from fides_plugins.attestation.refusal import Refusal

_HEAD = b"fides-development-report/1"
_ROOT = Ed25519PrivateKey.from_private_bytes(hashlib.sha256(b"fides-plugins: this key is not a secret").digest())
_SIGNATURE_BYTES = 64


def make_report(report_data: bytes) -> bytes:
    """A development report over 64 bytes."""
    body = _HEAD + report_data
    return body + _ROOT.sign(body)


def signed_part(report: bytes) -> bytes:
    """What the root signed."""
    return report[:-_SIGNATURE_BYTES]


def verify_report(report: bytes) -> ReportFacts:
    """Check the form of a development report.

    Raises
    ------
    Refusal
        `evidence-malformed` or `evidence-signature`.
    """
    if len(report) != len(_HEAD) + REPORT_DATA_BYTES + _SIGNATURE_BYTES or not report.startswith(_HEAD):
        raise Refusal("evidence-malformed", "This is not a development report.")
    body = signed_part(report)
    try:
        _ROOT.public_key().verify(report[-_SIGNATURE_BYTES:], body)
    except InvalidSignature:
        raise Refusal("evidence-signature", "The development report's signature is wrong.") from None
    return ReportFacts(
        tee="development",
        evidence_id=hashlib.sha256(body).digest(),
        report_data=body[len(_HEAD) :],
        measurements={},
        tcb="none: no hardware",
    )
