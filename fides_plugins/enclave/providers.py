"""Where evidence comes from: one class per way of asking the hardware.

Each takes 64 bytes of report data and gives the hardware's report over them. Paths and the few file operations
are arguments, because the kernel's configfs does not behave like an ordinary folder and tests have to imitate it.
What comes back is parsed, and refused unless it is about the report data that was asked for.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from fides_plugins.attestation import dcap, development, snp
from fides_plugins.attestation.evidence import REPORT_DATA_BYTES, Evidence, Tee
from fides_plugins.errors import EvidenceError

EvidenceKind = Literal["tdx", "sev-snp", "gramine-sgx", "development"]

TSM_ROOT = Path("/sys/kernel/config/tsm/report")
GRAMINE_ROOT = Path("/dev/attestation")

_GENERATIONS_TRIED = 5
#: GUIDs of the certificate table that SEV-SNP firmware hands out (AMD 56421, 4.1.8.1).
_VCEK_GUID = uuid.UUID("63da758d-e664-4564-adc5-f4b93be8accd")
_ASK_GUID = uuid.UUID("4ab7b379-bbac-4fe4-a02f-05aef327c782")
_ARK_GUID = uuid.UUID("c0b406a4-a803-4952-9743-3fb6014cd0ae")


class Files:
    """The file operations that a provider needs; tests play the kernel in their place."""

    def make(self, path: Path) -> None:
        """Make a folder."""
        path.mkdir()

    def remove(self, path: Path) -> None:
        """Remove a folder."""
        path.rmdir()

    def read(self, path: Path) -> bytes:
        """Read a whole file."""
        return path.read_bytes()

    def write(self, path: Path, data: bytes) -> None:
        """Write in one call: the kernel takes each write for a whole value."""
        handle = os.open(path, os.O_WRONLY)
        try:
            if os.write(handle, data) != len(data):
                raise OSError("short write")
        finally:
            os.close(handle)


class Provider(Protocol):
    """Asks one kind of hardware for evidence."""

    tee: Tee

    def report(self, report_data: bytes) -> Evidence:
        """Evidence without a statement over 64 bytes of report data."""


class DevelopmentProvider:
    """No hardware: see `fides_plugins.attestation.development`."""

    tee: Tee = "development"

    def report(self, report_data: bytes) -> Evidence:
        """A report that proves nothing."""
        return Evidence(self.tee, development.make_report(report_data))


@dataclass
class TsmProvider:
    """Linux configfs-tsm (kernel 6.7 and newer), in TDX and SEV-SNP guests.

    Attributes
    ----------
    tee:
        What the guest is expected to run on; anything else is refused.
    root:
        Folder of the kernel's reports.
    files:
        File operations.
    name:
        Makes the name of an entry; entries of several processes must not collide.
    """

    tee: Tee
    root: Path = TSM_ROOT
    files: Files = field(default_factory=Files)
    name: Callable[[], str] = lambda: f"fides-{uuid.uuid4().hex}"

    def report(self, report_data: bytes) -> Evidence:
        """Ask the kernel for a report.

        Raises
        ------
        EvidenceError
            If the hardware is missing, another writer kept interfering, or the report is about other
            data.
        """
        _check_length(report_data)
        entry = self.root / self.name()
        try:
            self.files.make(entry)
        except OSError as error:
            raise EvidenceError(
                f"The kernel offers no attestation reports ({error.strerror or error}).",
                "Run in a confidential VM with Linux 6.7 or newer and configfs mounted, or use --evidence development.",
            ) from None
        try:
            for _ in range(_GENERATIONS_TRIED):
                found = self._attempt(entry, report_data)
                if found is not None:
                    break
            else:
                raise EvidenceError("Another process keeps writing to this report entry.")
        except OSError as error:
            raise EvidenceError(f"The kernel could not make a report ({error.strerror or error}).") from None
        finally:
            self.files.remove(entry)
        blob, provider, extra = found
        expected = {"tdx": "tdx_guest", "sev-snp": "sev_guest"}[self.tee]
        if provider != expected:
            raise EvidenceError(f"The kernel's reports come from {provider!r}, not {expected!r}.")
        vcek, chain = certificates(extra) if self.tee == "sev-snp" else (b"", "")
        return _checked(Evidence(self.tee, blob, vcek=vcek, chain=chain), report_data)

    def _attempt(self, entry: Path, report_data: bytes) -> tuple[bytes, str, bytes] | None:
        """One request; None if somebody else wrote in between, which the generation shows."""
        before = int(self.files.read(entry / "generation"))
        self.files.write(entry / "inblob", report_data)
        blob = self.files.read(entry / "outblob")
        provider = self.files.read(entry / "provider").decode("ascii", "replace").strip()
        try:
            extra = self.files.read(entry / "auxblob")
        except OSError:  # optional: TDX has none, and not every host hands out certificates
            extra = b""
        return (blob, provider, extra) if int(self.files.read(entry / "generation")) == before + 1 else None


@dataclass
class GramineProvider:
    """Gramine in an SGX enclave, with `sgx.remote_attestation = "dcap"`."""

    root: Path = GRAMINE_ROOT
    files: Files = field(default_factory=Files)
    tee: Tee = "sgx"

    def report(self, report_data: bytes) -> Evidence:
        """Ask Gramine for a quote.

        Raises
        ------
        EvidenceError
            If this is not such an enclave, or the quote is about other data.
        """
        _check_length(report_data)
        try:
            kind = self.files.read(self.root / "attestation_type").decode("ascii", "replace").strip()
            if kind != "dcap":
                raise EvidenceError(f"Gramine's attestation type is {kind!r}, not 'dcap'.", "Set it in the manifest.")
            self.files.write(self.root / "user_report_data", report_data)
            quote = self.files.read(self.root / "quote")
        except OSError as error:
            raise EvidenceError(
                f"Gramine offers no attestation here ({error.strerror or error}).",
                "Start the verifier with gramine-sgx, or use --evidence development.",
            ) from None
        return _checked(Evidence(self.tee, quote), report_data)


def make_provider(kind: EvidenceKind) -> Provider:
    """The provider for a value of `--evidence`."""
    if kind == "development":
        return DevelopmentProvider()
    return GramineProvider() if kind == "gramine-sgx" else TsmProvider(kind)


def certificates(table: bytes) -> tuple[bytes, str]:
    """VCEK (DER) and chain (PEM, ASK then ARK) of a certificate table; empty where it holds none.

    An entry of the table is a GUID (16 bytes), an offset and a length (4 bytes each, little-endian); a zero
    GUID ends it.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import Encoding

    found: dict[uuid.UUID, bytes] = {}
    for position in range(0, len(table) - 23, 24):
        guid = table[position : position + 16]
        if not any(guid):
            break
        offset = int.from_bytes(table[position + 16 : position + 20], "little")
        length = int.from_bytes(table[position + 20 : position + 24], "little")
        # AMD writes GUIDs in their mixed-endian form.
        found[uuid.UUID(bytes_le=guid)] = table[offset : offset + length]
    try:
        chain = [
            x509.load_der_x509_certificate(found[guid]).public_bytes(Encoding.PEM).decode()
            for guid in (_ASK_GUID, _ARK_GUID)
            if guid in found
        ]
    except ValueError:
        chain = []
    return found.get(_VCEK_GUID, b""), "".join(chain)


def _check_length(report_data: bytes) -> None:
    if len(report_data) != REPORT_DATA_BYTES:
        raise EvidenceError(f"Report data must have {REPORT_DATA_BYTES} bytes, not {len(report_data)}.")


def _checked(evidence: Evidence, report_data: bytes) -> Evidence:
    """The evidence, if its report vouches for what it was asked to; clients would refuse another one anyway."""
    if evidence.tee == "sev-snp":
        given = evidence.report[0x50:0x90] if len(evidence.report) == snp.REPORT_BYTES else b""
    else:
        given = dcap.signed_part(evidence.report)[-REPORT_DATA_BYTES:]
    if given != report_data:
        raise EvidenceError("The hardware's report is not about the data it was asked for.")
    return evidence
