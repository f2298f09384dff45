"""Where evidence comes from: reports of the kernel and of Gramine, and what is wrong with them."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given, settings
from hypothesis import strategies as st

from fides_plugins.bundle import Bundle
from fides_plugins.cli.serve_verifier import _announce
from fides_plugins.enclave.providers import (
    DevelopmentProvider,
    GramineProvider,
    TsmProvider,
    certificates,
    make_provider,
)
from fides_plugins.enclave.verifier import Verifier
from fides_plugins.errors import EvidenceError
from tests.support.pki import AmdPki
from tests.support.verifiers import Hardware

DATA = bytes(range(64))


@pytest.fixture(scope="module")
def amd() -> AmdPki:
    return AmdPki()


class Kernel:
    """Plays Linux's configfs-tsm and Gramine's files: attributes appear with the folder, writes are requests."""

    def __init__(self, make: Any, provider: str = "tdx_guest", extra: bytes | None = None, disturb: int = 0) -> None:
        self.make_report = make
        self.provider = provider
        self.extra = extra
        self.disturb = disturb
        self.entries: dict[Path, dict[str, Any]] = {}
        self.removed: list[Path] = []

    def make(self, path: Path) -> None:
        if self.make_report is None:
            raise FileNotFoundError(2, "No such file or directory")
        self.entries[path] = {"generation": 0, "inblob": b""}

    def remove(self, path: Path) -> None:
        del self.entries[path]
        self.removed.append(path)

    def write(self, path: Path, data: bytes) -> None:
        entry = self.entries.setdefault(path.parent, {"generation": 0})
        entry["inblob"] = data
        entry["generation"] += 1

    def read(self, path: Path) -> bytes:
        entry = self.entries.setdefault(path.parent, {"generation": 0})
        if path.name == "generation":
            return f"{entry['generation']}\n".encode()
        if path.name in ("outblob", "quote"):
            blob = bytes(self.make_report(entry["inblob"]))
            if self.disturb:
                self.disturb -= 1
                entry["generation"] += 1  # another process wrote to this entry
            return blob
        if path.name == "provider":
            return f"{self.provider}\n".encode()
        if path.name == "attestation_type":
            return self.provider.encode()
        if path.name == "auxblob" and self.extra is not None:
            return self.extra
        raise FileNotFoundError(2, "No such file or directory")


def test_tdx_reports_from_the_kernel(hardware: Hardware) -> None:
    kernel = Kernel(lambda data: hardware.intel.quote("tdx", data))
    evidence = TsmProvider("tdx", files=kernel).report(DATA)
    assert evidence.tee == "tdx"
    assert kernel.entries == {}
    assert len(kernel.removed) == 1
    # Somebody else wrote to the entry twice: asked again, then given up.
    assert TsmProvider("tdx", files=Kernel(kernel.make_report, disturb=2)).report(DATA).report
    busy = Kernel(kernel.make_report, disturb=1000)
    with pytest.raises(EvidenceError, match="keeps writing"):
        TsmProvider("tdx", files=busy).report(DATA)
    assert busy.entries == {}


def certificate_table(entries: dict[str, bytes]) -> bytes:
    """GUIDs, offsets and lengths, then the certificates, as SEV-SNP firmware hands them out."""
    offset = 24 * (len(entries) + 1)
    table, tail = b"", b""
    for guid, data in entries.items():
        table += uuid.UUID(guid).bytes_le + (offset + len(tail)).to_bytes(4, "little") + len(data).to_bytes(4, "little")
        tail += data
    return table + bytes(24) + tail


def test_snp_reports_and_certificates_from_the_kernel(amd: AmdPki) -> None:
    table = certificate_table(
        {
            "c0b406a4-a803-4952-9743-3fb6014cd0ae": amd.ark.public_bytes(Encoding.DER),
            "4ab7b379-bbac-4fe4-a02f-05aef327c782": amd.ask.public_bytes(Encoding.DER),
            "63da758d-e664-4564-adc5-f4b93be8accd": amd.vcek,
        }
    )
    kernel = Kernel(lambda data: amd.report(data), "sev_guest", table)
    evidence = TsmProvider("sev-snp", files=kernel).report(DATA)
    assert evidence.vcek == amd.vcek
    assert evidence.chain == amd.chain
    without = TsmProvider("sev-snp", files=Kernel(lambda data: amd.report(data), "sev_guest")).report(DATA)
    assert (without.vcek, without.chain) == (b"", "")


@given(st.binary(max_size=400))
@settings(max_examples=200, deadline=None)
def test_broken_certificate_tables_give_nothing_and_do_not_crash(table: bytes) -> None:
    vcek, chain = certificates(table)
    assert isinstance(vcek, bytes)
    assert chain == ""


def test_gramine_quotes(hardware: Hardware) -> None:
    class Gramine(Kernel):
        def write(self, path: Path, data: bytes) -> None:
            assert path.name == "user_report_data"
            super().write(path, data)

    kernel = Gramine(lambda data: hardware.intel.quote("sgx", data), "dcap")
    assert GramineProvider(files=kernel).report(DATA).tee == "sgx"
    with pytest.raises(EvidenceError, match="'none', not 'dcap'"):
        GramineProvider(files=Gramine(lambda data: b"", "none")).report(DATA)


@pytest.mark.parametrize("zero", ["rtmr3", ""])
def test_a_machine_that_measured_nothing_says_so_at_the_start(
    hardware: Hardware, bundle: Bundle, zero: str, capsys: pytest.CaptureFixture[str]
) -> None:
    kernel = Kernel(lambda data: hardware.intel.quote("tdx", data, zero=zero))
    _announce(Verifier(bundle, TsmProvider("tdx", files=kernel)), "127.0.0.1:1")
    assert ("RTMR3 is zero" in capsys.readouterr().err) is bool(zero)


def test_hardware_that_is_not_there_or_lies(hardware: Hardware, amd: AmdPki, tmp_path: Path) -> None:
    with pytest.raises(EvidenceError, match="confidential VM"):
        TsmProvider("tdx", files=Kernel(None)).report(DATA)
    with pytest.raises(EvidenceError, match="confidential VM"):
        TsmProvider("tdx", root=tmp_path / "absent").report(DATA)
    with pytest.raises(EvidenceError, match="gramine-sgx"):
        GramineProvider(root=tmp_path).report(DATA)
    with pytest.raises(EvidenceError, match="come from 'sev_guest'"):
        TsmProvider("tdx", files=Kernel(lambda d: hardware.intel.quote("tdx", d), "sev_guest")).report(DATA)
    with pytest.raises(EvidenceError, match="not about the data"):
        TsmProvider("tdx", files=Kernel(lambda d: hardware.intel.quote("tdx", bytes(64)))).report(DATA)
    with pytest.raises(EvidenceError, match="not about the data"):
        TsmProvider("sev-snp", files=Kernel(lambda d: b"short", "sev_guest")).report(DATA)
    with pytest.raises(EvidenceError, match="64 bytes"):
        TsmProvider("tdx", files=Kernel(lambda d: b"")).report(b"short")


def test_providers_by_name() -> None:
    assert make_provider("tdx").tee == "tdx"
    assert make_provider("sev-snp").tee == "sev-snp"
    assert make_provider("gramine-sgx").tee == "sgx"
    assert isinstance(make_provider("development"), DevelopmentProvider)


def test_the_real_files_write_in_one_call(tmp_path: Path) -> None:
    files = GramineProvider().files
    target = tmp_path / "folder"
    files.make(target)
    (target / "inblob").write_bytes(b"")
    files.write(target / "inblob", DATA)
    assert files.read(target / "inblob") == DATA
    (target / "inblob").unlink()
    files.remove(target)
    assert not target.exists()
