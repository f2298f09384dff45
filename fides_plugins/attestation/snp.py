"""Attestation reports of AMD SEV-SNP, verified with `cryptography`.

Layout and checks: SEV Secure Nested Paging Firmware ABI Specification (AMD 56860), table "ATTESTATION_REPORT",
and the VCEK Certificate and KDS Interface Specification (AMD 57230). The chip's key (VCEK) signs the first
672 bytes with ECDSA on P-384; the chain VCEK <- ASK <- ARK ends in a pinned ARK. Generations whose ARK is
not pinned here are refused, Turin with its other TCB layout among them. Revocation lists are not consulted.
"""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Mapping

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding

from fides_plugins.attestation.evidence import ReportFacts
from fides_plugins.attestation.policy import EvidencePolicy
from fides_plugins.attestation.refusal import Refusal

REPORT_BYTES = 1184
SIGNED_BYTES = 672
_VERSIONS = range(2, 6)
_SIGNATURE_AT, _COMPONENT_BYTES, _SCALAR_BYTES = SIGNED_BYTES, 72, 48

_POLICY_SMT = 1 << 16
_POLICY_MIGRATION = 1 << 18
_POLICY_DEBUG = 1 << 19

#: SHA-256 of AMD's root certificates (DER), by processor generation.
AMD_ROOTS: Mapping[str, str] = {
    "Milan": "69d063b45344d26a2e94e1f4210de49ef555308287d4c174445c95639a540bcd",
    "Genoa": "4c6598d19c18719c5dfd4a7d335f674e5bfe1d8f800cea2cf270c10d103db2f1",
}

_OID = "1.3.6.1.4.1.3704.1"
_OID_PRODUCT = f"{_OID}.2"
_OID_CHIP = f"{_OID}.4"
#: Component of the TCB, its byte in the report's TCB_VERSION, its extension in the VCEK.
_TCB = {
    "bootloader": (0, f"{_OID}.3.1"),
    "tee": (1, f"{_OID}.3.2"),
    "snp": (6, f"{_OID}.3.3"),
    "microcode": (7, f"{_OID}.3.8"),
}


def _extension(certificate: x509.Certificate, oid: str) -> bytes:
    try:
        value = certificate.extensions.get_extension_for_oid(x509.ObjectIdentifier(oid)).value
    except (x509.ExtensionNotFound, ValueError):
        raise Refusal("evidence-certificate", f"The VCEK lacks AMD's extension {oid}.") from None
    assert isinstance(value, x509.UnrecognizedExtension)
    return value.value


def _der_value(data: bytes) -> bytes:
    """Contents of one short DER element; AMD's values are all shorter than 128 bytes."""
    if len(data) < 2 or len(data) != 2 + data[1]:
        raise Refusal("evidence-certificate", "An extension of the VCEK is not well-formed.")
    return data[2:]


def _chain(vcek: bytes, chain: str, roots: Mapping[str, str], now: float) -> tuple[x509.Certificate, str]:
    """The checked VCEK and the generation that its pinned root stands for."""
    try:
        leaf = x509.load_der_x509_certificate(vcek)
        intermediate, root = x509.load_pem_x509_certificates(chain.encode())
    except ValueError:
        raise Refusal(
            "evidence-certificate", "The VCEK is not a DER certificate, or the chain not ASK and ARK in PEM."
        ) from None
    fingerprint = hashlib.sha256(root.public_bytes(Encoding.DER)).hexdigest()
    product = next((name for name, pinned in roots.items() if pinned == fingerprint), "")
    if not product:
        raise Refusal(
            "evidence-root", "The chain does not end in a known root of AMD: its generation is not supported."
        )
    moment = datetime.datetime.fromtimestamp(now, datetime.timezone.utc)
    for certificate, issuer in ((root, root), (intermediate, root), (leaf, intermediate)):
        try:
            certificate.verify_directly_issued_by(issuer)
        except (InvalidSignature, ValueError, TypeError):
            raise Refusal("evidence-certificate", "The chain VCEK, ASK, ARK is broken.") from None
        if not certificate.not_valid_before_utc <= moment <= certificate.not_valid_after_utc:
            raise Refusal("evidence-expired", "A certificate of the chain is not valid at this time.")
    return leaf, product


def verify_report(
    report: bytes, vcek: bytes, chain: str, policy: EvidencePolicy, now: float, roots: Mapping[str, str] = AMD_ROOTS
) -> ReportFacts:
    """Verify an attestation report and return what it says.

    Parameters
    ----------
    report:
        The 1184 bytes.
    vcek, chain:
        The chip's certificate (DER); ASK and ARK (PEM, in this order).
    policy:
        Only its fields about the platform are used here.
    now:
        Seconds since 1970.
    roots:
        Generation to SHA-256 of its ARK; for tests with their own PKI.

    Raises
    ------
    Refusal
        `evidence-malformed`, `evidence-root`, `evidence-certificate`, `evidence-expired`,
        `evidence-signature`, `evidence-chip`, `evidence-tcb`, `evidence-debug`, `evidence-vmpl` or
        `evidence-platform`.
    """
    version = int.from_bytes(report[:4], "little")
    if len(report) != REPORT_BYTES or version not in _VERSIONS or int.from_bytes(report[0x34:0x38], "little") != 1:
        raise Refusal("evidence-malformed", "This is not an SEV-SNP report of a known version and signature algorithm.")
    leaf, product = _chain(vcek, chain, roots, now)

    key = leaf.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise Refusal("evidence-certificate", "The VCEK's key is not on P-384.")
    parts = []
    for at in (_SIGNATURE_AT, _SIGNATURE_AT + _COMPONENT_BYTES):
        # Zero padding and the reserved rest are not covered by the signature, so they are required to be zero.
        parts.append(int.from_bytes(report[at : at + _COMPONENT_BYTES], "little"))
    padding = report[_SIGNATURE_AT + 2 * _COMPONENT_BYTES :]
    if max(parts) >> (8 * _SCALAR_BYTES) or any(padding):
        raise Refusal("evidence-signature", "The report has bytes behind its signature.")
    try:
        key.verify(encode_dss_signature(*parts), report[:SIGNED_BYTES], ec.ECDSA(hashes.SHA384()))
    except InvalidSignature:
        raise Refusal("evidence-signature", "The chip's signature over the report is wrong.") from None

    # The key is good; is it this chip's, at this firmware?
    flags = int.from_bytes(report[0x48:0x4C], "little")
    if flags >> 2 & 0b111:
        raise Refusal("evidence-platform", "The report is not signed by a VCEK.")
    if _extension(leaf, _OID_CHIP) != report[0x1A0:0x1E0]:
        raise Refusal("evidence-chip", "The VCEK belongs to another chip than the report.")
    if not _der_value(_extension(leaf, _OID_PRODUCT)).decode("ascii", "replace").startswith(product):
        raise Refusal("evidence-chip", f"The VCEK does not belong to a {product} processor.")
    levels = {name: report[0x180 + at] for name, (at, _) in _TCB.items()}
    for name, (_, oid) in _TCB.items():
        if int.from_bytes(_der_value(_extension(leaf, oid)), "big") != levels[name]:
            raise Refusal("evidence-tcb", "The VCEK was issued for another firmware than the report's.")

    guest = int.from_bytes(report[8:16], "little")
    if guest & _POLICY_DEBUG and not policy.allow_snp_debug:
        raise Refusal("evidence-debug", "The guest allows debugging, so the host can read it.")
    if guest & _POLICY_MIGRATION and not policy.allow_snp_migration:
        raise Refusal("evidence-platform", "The guest allows a migration agent.", "Or set allow_snp_migration.")
    if guest & _POLICY_SMT and int.from_bytes(report[0x40:0x48], "little") & 1 and not policy.allow_smt:
        raise Refusal("evidence-platform", "The guest runs with hyperthreading.", "Or set allow_smt.")
    if int.from_bytes(report[0x30:0x34], "little") != 0:
        raise Refusal("evidence-vmpl", "The report was not asked for at privilege level 0.")
    floor = policy.snp_minimum_tcb
    if floor is None:
        raise Refusal("evidence-tcb", "The policy names no minimum TCB for SEV-SNP.", "Set snp_minimum_tcb.")
    for name, level in levels.items():
        if level < getattr(floor, name):
            raise Refusal("evidence-tcb", f"The platform's {name} is at {level}, below the policy's minimum.")
    return ReportFacts(
        tee="sev-snp",
        evidence_id=hashlib.sha256(report[:SIGNED_BYTES]).digest(),
        report_data=report[0x50:0x90],
        measurements={"measurement": report[0x90:0xC0].hex(), "host_data": report[0xC0:0xE0].hex()},
        tcb=f"{product} " + " ".join(f"{name}={level}" for name, level in levels.items()),
    )
