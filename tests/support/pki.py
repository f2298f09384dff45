"""A public-key infrastructure of our own for SGX, TDX and SEV-SNP: real formats, our own roots.

It stands in for Intel, AMD and the processors, so that tests can make evidence for any measurement,
report data, firmware level and mode. Formats: Intel's quote format 3 (SGX) and 4 (TDX) with collateral as its
provisioning service gives it; AMD's SEV-SNP ABI, table ATTESTATION_REPORT.
"""

from __future__ import annotations

import datetime
import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import NameOID

from fides_plugins.attestation.verify import TrustRoots

#: The moment at which everything here is valid.
NOW = datetime.datetime(2026, 6, 1, tzinfo=datetime.timezone.utc)
NOW_S = NOW.timestamp()
DAY = datetime.timedelta(days=1)
FMSPC = bytes.fromhex("00a067110000")
CPU_SVN = bytes((11, 11, 2, 2, 255, 1)) + bytes(10)
PCE_SVN = 13
QE_SIGNER = hashlib.sha256(b"quoting enclave signer").digest()
SGX_OID = "1.2.840.113741.1.13.1"
AMD_OID = "1.3.6.1.4.1.3704.1"


def der(tag: int, *parts: bytes) -> bytes:
    """One DER element."""
    body = b"".join(parts)
    if len(body) < 128:
        return bytes((tag, len(body))) + body
    length = len(body).to_bytes((len(body).bit_length() + 7) // 8, "big")
    return bytes((tag, 0x80 | len(length))) + length + body


def der_int(value: int) -> bytes:
    return der(2, value.to_bytes(value.bit_length() // 8 + 1, "big"))


def der_oid(dotted: str) -> bytes:
    first, second, *rest = (int(p) for p in dotted.split("."))
    out = bytes((40 * first + second,))
    for arc in rest:
        groups = [arc & 0x7F]
        while arc := arc >> 7:
            groups.append(0x80 | arc & 0x7F)
        out += bytes(reversed(groups))
    return der(6, out)


def pair(dotted: str, value: bytes) -> bytes:
    return der(0x30, der_oid(dotted), value)


def raw_signature(key: ec.EllipticCurvePrivateKey, data: bytes) -> bytes:
    """r and s, 32 bytes each, big-endian, as Intel's structures hold them."""
    r, s = decode_dss_signature(key.sign(data, ec.ECDSA(hashes.SHA256())))
    return r.to_bytes(32, "big") + s.to_bytes(32, "big")


def raw_point(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)[1:]


def name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def pem(*certificates: x509.Certificate) -> str:
    return "".join(c.public_bytes(Encoding.PEM).decode() for c in certificates)


@dataclass
class IntelPki:
    """Root, processor certificates, collateral and quotes."""

    dynamic_platform: bool = False
    tcb_status: str = "UpToDate"
    keys: dict[str, ec.EllipticCurvePrivateKey] = field(
        default_factory=lambda: {k: ec.generate_private_key(ec.SECP256R1()) for k in ("root", "ca", "pck", "tcb", "ak")}
    )

    def _certificate(
        self, subject: str, key: str, issuer: str, issuer_key: str, ca: bool, extension: bytes = b""
    ) -> x509.Certificate:
        builder = (
            x509.CertificateBuilder()
            .subject_name(name(subject))
            .issuer_name(name(issuer))
            .public_key(self.keys[key].public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(NOW - 365 * DAY)
            .not_valid_after(NOW + 365 * DAY)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self.keys[issuer_key].public_key()), critical=False
            )
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(self.keys[key].public_key()), critical=False)
            .add_extension(x509.BasicConstraints(ca, None), critical=True)
            .add_extension(x509.KeyUsage(not ca, not ca, False, False, False, ca, ca, False, False), critical=True)
        )
        if extension:
            unknown = x509.UnrecognizedExtension(x509.ObjectIdentifier(SGX_OID), extension)
            builder = builder.add_extension(unknown, critical=False)
        return builder.sign(self.keys[issuer_key], hashes.SHA256())

    @cached_property
    def root(self) -> x509.Certificate:
        return self._certificate("Test SGX Root CA", "root", "Test SGX Root CA", "root", True)

    @cached_property
    def ca(self) -> x509.Certificate:
        # dcap-qvl reads from the name which kind of CA it is.
        return self._certificate("Intel SGX PCK Platform CA", "ca", "Test SGX Root CA", "root", True)

    @cached_property
    def tcb_signer(self) -> x509.Certificate:
        return self._certificate("Test TCB Signing", "tcb", "Test SGX Root CA", "root", False)

    @cached_property
    def pck(self) -> x509.Certificate:
        oid = SGX_OID
        components = [pair(f"{oid}.2.{i + 1}", der_int(v)) for i, v in enumerate(CPU_SVN)]
        tcb = der(0x30, *components, pair(f"{oid}.2.17", der_int(PCE_SVN)), pair(f"{oid}.2.18", der(4, CPU_SVN)))
        flag = der(1, b"\xff" if self.dynamic_platform else b"\x00")
        extension = der(
            0x30,
            pair(f"{oid}.1", der(4, bytes(16))),
            pair(f"{oid}.2", tcb),
            pair(f"{oid}.3", der(4, bytes(2))),
            pair(f"{oid}.4", der(4, FMSPC)),
            pair(f"{oid}.5", der(0x0A, b"\x00")),
            pair(f"{oid}.6", der(4, bytes(16))),
            pair(f"{oid}.7", der(0x30, *(pair(f"{oid}.7.{i}", flag) for i in (1, 2, 3)))),
        )
        return self._certificate(
            "Intel SGX PCK Certificate", "pck", "Intel SGX PCK Platform CA", "ca", False, extension
        )

    def _crl(self, issuer: str, key: str) -> bytes:
        crl = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(name(issuer))
            .last_update(NOW - 30 * DAY)
            .next_update(NOW + 30 * DAY)
            .add_extension(x509.CRLNumber(1), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self.keys[key].public_key()), critical=False
            )
            .sign(self.keys[key], hashes.SHA256())
        )
        return crl.public_bytes(Encoding.DER)

    def collateral(self, tee: str) -> str:
        """Collateral of the platform, signed by our own root."""
        window = {
            "issueDate": (NOW - 15 * DAY).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "nextUpdate": (NOW + 15 * DAY).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "tcbEvaluationDataNumber": 17,
        }
        tcb: dict[str, Any] = {"sgxtcbcomponents": [{"svn": v} for v in CPU_SVN], "pcesvn": PCE_SVN}
        if tee == "tdx":
            tcb["tdxtcbcomponents"] = [{"svn": 0}] * 16
        level = {"tcb": tcb, "tcbDate": "2026-01-01T00:00:00Z", "tcbStatus": self.tcb_status, "advisoryIDs": []}
        info: dict[str, Any] = {
            "id": "TDX" if tee == "tdx" else "SGX",
            "version": 3,
            **window,
            "fmspc": FMSPC.hex().upper(),
            "pceId": "0000",
            "tcbType": 0,
            "tcbLevels": [level],
        }
        if tee == "tdx":
            info["tdxModule"] = {"mrsigner": "00" * 48, "attributes": "00" * 8, "attributesMask": "FF" * 8}
            info["tdxModuleIdentities"] = []
        identity = {
            "id": "TD_QE" if tee == "tdx" else "QE",
            "version": 2,
            **window,
            "miscselect": "00000000",
            "miscselectMask": "FFFFFFFF",
            "attributes": "11" + "00" * 15,
            "attributesMask": "FBFFFFFFFFFFFFFF" + "00" * 8,
            "mrsigner": QE_SIGNER.hex().upper(),
            "isvprodid": 1,
            "tcbLevels": [{"tcb": {"isvsvn": 4}, "tcbDate": "2026-01-01T00:00:00Z", "tcbStatus": "UpToDate"}],
        }
        info_text, identity_text = json.dumps(info), json.dumps(identity)
        signers = pem(self.tcb_signer, self.root)
        return json.dumps(
            {
                "pck_crl_issuer_chain": pem(self.ca, self.root),
                "root_ca_crl": self._crl("Test SGX Root CA", "root").hex(),
                "pck_crl": self._crl("Intel SGX PCK Platform CA", "ca").hex(),
                "tcb_info_issuer_chain": signers,
                "tcb_info": info_text,
                "tcb_info_signature": raw_signature(self.keys["tcb"], info_text.encode()).hex(),
                "qe_identity_issuer_chain": signers,
                "qe_identity": identity_text,
                "qe_identity_signature": raw_signature(self.keys["tcb"], identity_text.encode()).hex(),
            }
        )

    @staticmethod
    def _enclave_report(signer: bytes, enclave: bytes, attributes: int, report_data: bytes, svn: int) -> bytes:
        return (
            CPU_SVN
            + bytes(32)
            + attributes.to_bytes(8, "little")
            + (0xE7).to_bytes(8, "little")
            + enclave
            + bytes(32)
            + signer
            + bytes(96)
            + (1).to_bytes(2, "little")
            + svn.to_bytes(2, "little")
            + bytes(60)
            + report_data
        )

    def quote(
        self, tee: str, report_data: bytes, measurement: str = "program", debug: bool = False, zero: str = ""
    ) -> bytes:
        """A quote whose registers are digests of `measurement` and their own names; one may be zero (TDX)."""
        attestation = raw_point(self.keys["ak"])
        auth = bytes(range(32))
        qe = self._enclave_report(
            QE_SIGNER, bytes(32), 0x15, hashlib.sha256(attestation + auth).digest() + bytes(32), svn=8
        )
        version = 4 if tee == "tdx" else 3
        head = version.to_bytes(2, "little") + (2).to_bytes(2, "little")
        head += (0x81 if tee == "tdx" else 0).to_bytes(4, "little") + bytes(4)
        head += bytes.fromhex("939a7233f79c4ca9940a0db3957f0607") + bytes(20)
        if tee == "tdx":
            registers = {n: register(measurement, n) for n in ("mrtd", "rtmr0", "rtmr1", "rtmr2", "rtmr3")}
            registers |= {zero: bytes(48)} if zero else {}
            td_attributes = (0x10000000 | int(debug)).to_bytes(8, "little")  # SEPT_VE_DISABLE
            body = bytes(16) + bytes(96) + bytes(8) + td_attributes + bytes.fromhex("e702060000000000")
            body += registers["mrtd"] + bytes(144) + b"".join(registers[f"rtmr{i}"] for i in range(4)) + report_data
        else:
            body = self._enclave_report(
                register(measurement, "mrsigner")[:32],
                register(measurement, "mrenclave")[:32],
                0x05 | (0x02 if debug else 0),
                report_data,
                svn=3,
            )
        chain = pem(self.pck, self.ca, self.root).encode()
        certification = (5).to_bytes(2, "little") + len(chain).to_bytes(4, "little") + chain
        vouch = qe + raw_signature(self.keys["pck"], qe) + len(auth).to_bytes(2, "little") + auth + certification
        if tee == "tdx":
            vouch = (6).to_bytes(2, "little") + len(vouch).to_bytes(4, "little") + vouch
        signature = raw_signature(self.keys["ak"], head + body) + attestation + vouch
        return head + body + len(signature).to_bytes(4, "little") + signature


def register(measurement: str, what: str) -> bytes:
    """The 48 bytes that the register `what` holds for a program."""
    return hashlib.sha384(f"{measurement}/{what}".encode()).digest()


@dataclass
class AmdPki:
    """ARK, ASK, the chip's certificate and reports."""

    product: str = "Milan"
    levels: tuple[int, int, int, int] = (3, 0, 20, 209)
    ark_key: rsa.RSAPrivateKey = field(default_factory=lambda: rsa.generate_private_key(65537, 2048))
    ask_key: rsa.RSAPrivateKey = field(default_factory=lambda: rsa.generate_private_key(65537, 2048))
    vcek_key: ec.EllipticCurvePrivateKey = field(default_factory=lambda: ec.generate_private_key(ec.SECP384R1()))
    chip_id: bytes = bytes(range(64))

    def _certificate(
        self, subject: str, key: Any, issuer: str, issuer_key: rsa.RSAPrivateKey, extensions: dict[str, bytes]
    ) -> x509.Certificate:
        builder = (
            x509.CertificateBuilder()
            .subject_name(name(subject))
            .issuer_name(name(issuer))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(NOW - 365 * DAY)
            .not_valid_after(NOW + 365 * DAY)
        )
        for oid, value in extensions.items():
            unknown = x509.UnrecognizedExtension(x509.ObjectIdentifier(f"{AMD_OID}.{oid}"), value)
            builder = builder.add_extension(unknown, critical=False)
        pss = padding.PSS(mgf=padding.MGF1(hashes.SHA384()), salt_length=48)
        return builder.sign(issuer_key, hashes.SHA384(), rsa_padding=pss)

    @cached_property
    def ark(self) -> x509.Certificate:
        return self._certificate("ARK-Test", self.ark_key, "ARK-Test", self.ark_key, {})

    @cached_property
    def ask(self) -> x509.Certificate:
        return self._certificate("SEV-Test", self.ask_key, "ARK-Test", self.ark_key, {})

    @cached_property
    def chain(self) -> str:
        return pem(self.ask, self.ark)

    @cached_property
    def vcek(self) -> bytes:
        levels = dict(zip(("3.1", "3.2", "3.3", "3.8"), (der_int(v) for v in self.levels), strict=True))
        product = der(0x16, f"{self.product}-B0".encode())
        extensions = {"2": product, "4": self.chip_id, **levels}
        certificate = self._certificate("SEV-VCEK", self.vcek_key, "SEV-Test", self.ask_key, extensions)
        return certificate.public_bytes(Encoding.DER)

    @property
    def roots(self) -> dict[str, str]:
        return {self.product: hashlib.sha256(self.ark.public_bytes(Encoding.DER)).hexdigest()}

    def report(
        self,
        report_data: bytes,
        measurement: str = "program",
        guest_policy: int = 1 << 17,
        vmpl: int = 0,
        version: int = 2,
        chip_id: bytes | None = None,
        levels: tuple[int, int, int, int] | None = None,
        flags: int = 0,
        platform: int = 0,
    ) -> bytes:
        """A signed report."""
        body = bytearray(672)
        body[0:4] = version.to_bytes(4, "little")
        body[8:16] = guest_policy.to_bytes(8, "little")
        body[0x30:0x34] = vmpl.to_bytes(4, "little")
        body[0x34:0x38] = (1).to_bytes(4, "little")
        body[0x40:0x48] = platform.to_bytes(8, "little")
        body[0x48:0x4C] = flags.to_bytes(4, "little")
        body[0x50:0x90] = report_data
        body[0x90:0xC0] = register(measurement, "measurement")
        for at, level in zip((0, 1, 6, 7), levels or self.levels, strict=True):
            body[0x180 + at] = level
        body[0x1A0:0x1E0] = self.chip_id if chip_id is None else chip_id
        r, s = decode_dss_signature(self.vcek_key.sign(bytes(body), ec.ECDSA(hashes.SHA384())))
        return bytes(body) + r.to_bytes(72, "little") + s.to_bytes(72, "little") + bytes(368)


def roots_of(intel: IntelPki, amd: AmdPki) -> TrustRoots:
    """Trust in our own roots alone."""
    return TrustRoots(intel=intel.root.public_bytes(Encoding.DER), amd=amd.roots)


def measurement_of(tee: str, measurement: str = "program") -> dict[str, Any]:
    """The entry of a policy that trusts a program."""
    if tee == "tdx":
        return {"tee": tee, **{n: register(measurement, n).hex() for n in ("mrtd", "rtmr0", "rtmr1", "rtmr2", "rtmr3")}}
    if tee == "sgx":
        return {"tee": tee, "mrenclave": register(measurement, "mrenclave")[:32].hex()}
    return {"tee": tee, "measurement": register(measurement, "measurement").hex()}
