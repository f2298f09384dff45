"""Attestation evidence: what a verifier publishes about itself, and what a client gets out of it.

A TEE signs 64 bytes of report data. They are a digest of the statement below, so one signature by the
hardware vouches for the keys, the bundle and the configuration. The document carries what is needed to
check that signature offline; certificates and collateral are signed themselves, so it does not matter
that they pass through the host.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainSerializer, ValidationError

from fides_plugins.attestation import cose
from fides_plugins.attestation.refusal import Refusal

Tee = Literal["sgx", "tdx", "sev-snp", "development"]

PROFILE: Final = "fides-evidence/1"
REPORT_DATA_BYTES = 64
CHALLENGE_BYTES = 32
_REPORT_DATA_DOMAIN = b"fides-report-data/1"
_MAX_DOCUMENT_BYTES = 1 << 20


def _unbase64(text: bytes) -> bytes:
    return base64.b64decode(text, validate=True)


# How bytes are written in the document: JSON has only text, whose UTF-8 the readers get.
_Base64 = Annotated[bytes, AfterValidator(_unbase64), PlainSerializer(lambda data: base64.b64encode(data).decode())]
_READ, _WRITE = AfterValidator(binascii.unhexlify), PlainSerializer(bytes.hex)
_Bytes16 = Annotated[bytes, Field(min_length=32, max_length=32), _READ, _WRITE]
_Bytes32 = Annotated[bytes, Field(min_length=64, max_length=64), _READ, _WRITE]
_Challenge = Annotated[bytes, Field(max_length=2 * CHALLENGE_BYTES), _READ, _WRITE]
_STRICT = ConfigDict(extra="forbid", strict=True)


@dataclass(frozen=True)
class Statement:
    """What the report data binds.

    Attributes
    ----------
    signing_key, encryption_key:
        Ed25519 and X25519 public keys (32 bytes each), new at every start.
    bundle_digest:
        SHA-256 of the bundle's manifest (32 bytes).
    configuration:
        Canonical JSON: bundle version, preprocessing, rounding, schemes, allowed clients.
    boot_id:
        16 random bytes of this start.
    issued_at:
        Seconds since 1970 by the host's clock.
    challenge:
        What the reader of the evidence asked to be bound (32 bytes), or empty. It proves the age of the
        evidence, which the host's clock cannot.
    """

    __pydantic_config__ = _STRICT

    signing_key: _Bytes32
    encryption_key: _Bytes32
    bundle_digest: _Bytes32
    configuration: str
    boot_id: _Bytes16
    issued_at: int
    challenge: _Challenge

    @property
    def key_id(self) -> bytes:
        """Key id of the signing key; 32 bytes."""
        return cose.key_id(self.signing_key)

    @property
    def settings(self) -> dict[str, Any]:
        """The configuration, decoded.

        Raises
        ------
        Refusal
            `evidence-malformed`.
        """
        try:
            value = json.loads(self.configuration)
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise Refusal("evidence-malformed", "The configuration in the evidence is not a JSON object.")
        return value

    def report_data(self) -> bytes:
        """SHA-512 over the domain tag and the length-prefixed fields; 64 bytes."""
        digest = hashlib.sha512(_REPORT_DATA_DOMAIN)
        for part in (
            self.signing_key,
            self.encryption_key,
            self.bundle_digest,
            hashlib.sha256(self.configuration.encode()).digest(),
            self.boot_id,
            str(self.issued_at).encode(),
            self.challenge,
        ):
            digest.update(len(part).to_bytes(4, "big") + part)
        return digest.digest()


@dataclass(frozen=True)
class Evidence:
    """A statement with the hardware's report about it.

    Attributes
    ----------
    tee:
        Kind of TEE that made the report.
    report:
        Quote (SGX, TDX), attestation report (SEV-SNP) or development report.
    statement:
        What the report data binds; None for a bare report from elsewhere.
    collateral:
        Intel's collateral as JSON text; SGX and TDX only.
    vcek, chain:
        The chip's certificate (DER) and AMD's ASK and ARK (PEM); SEV-SNP only.
    """

    tee: Tee
    report: bytes
    statement: Statement | None = None
    collateral: str = ""
    vcek: bytes = b""
    chain: str = ""

    def to_json(self) -> str:
        """The document, as the verifier's evidence endpoint gives it."""
        return _Document.model_construct(profile=PROFILE, **vars(self)).model_dump_json(indent=1)

    @classmethod
    def from_json(cls, text: str | bytes) -> Evidence:
        """Read a document.

        Raises
        ------
        Refusal
            `evidence-malformed`.
        """
        if len(text) > _MAX_DOCUMENT_BYTES:
            raise Refusal("evidence-malformed", "The evidence document is longer than 1 MiB.")
        try:
            document = _Document.model_validate_json(text)
        except ValidationError as error:
            where = ".".join(str(p) for p in error.errors()[0]["loc"]) or "the document"
            raise Refusal("evidence-malformed", f"The evidence document is not of {PROFILE}: see {where}.") from None
        fields = dict(document)
        del fields["profile"]
        return cls(**fields)


class _Document(BaseModel):
    model_config = _STRICT

    profile: Literal["fides-evidence/1"]
    tee: Tee
    report: _Base64
    statement: Statement | None
    collateral: str
    vcek: _Base64
    chain: str


@dataclass(frozen=True)
class ReportFacts:
    """What a verified hardware report says; made by `dcap`, `snp` and `development`.

    Attributes
    ----------
    tee:
        Kind of TEE.
    evidence_id:
        SHA-256 of the part that the hardware signed (32 bytes). Certificates and trailing bytes around it
        can be changed without breaking the signature, so the whole report identifies nothing.
    report_data:
        The 64 bytes that software chose.
    measurements:
        Names of measurement registers to their values in hexadecimal.
    tcb:
        State of the platform's firmware, in the vendor's words.
    advisories:
        The vendor's advisories that apply.
    """

    tee: Tee
    evidence_id: bytes
    report_data: bytes
    measurements: dict[str, str]
    tcb: str
    advisories: tuple[str, ...] = ()
