"""Evidence for tests: where the public samples lie, what trusts them, and statements attested by our own PKI."""

from __future__ import annotations

import datetime
import json
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fides_plugins.attestation.evidence import Evidence, Statement
from fides_plugins.attestation.policy import EvidencePolicy, SnpTcb
from fides_plugins.attestation.refusal import Refusal
from fides_plugins.attestation.verify import verify_evidence
from tests.support.paths import SHARED_DATA
from tests.support.pki import NOW_S, AmdPki, IntelPki, measurement_of

SAMPLES = SHARED_DATA / "attestation"
needs_samples = pytest.mark.skipif(not SAMPLES.is_dir(), reason="the public sample evidence is not here")


def at(day: str) -> float:
    return datetime.datetime.fromisoformat(f"{day}T00:00:00+00:00").timestamp()


def refusal(evidence: Evidence, policy: EvidencePolicy, now: float = NOW_S, **options: Any) -> str:
    with pytest.raises(Refusal) as caught:
        verify_evidence(evidence, policy, now, **options)
    return caught.value.code


# What trusts the public samples

SGX = {
    "measurements": [{"tee": "sgx", "mrenclave": "33d8736db756ed4997e04ba358d27833188f1932ff7b1d156904d3f560452fbb"}],
    "report_data": b"Hello, world!".hex() + "00" * 51,
    "allowed_tcb_status": ["ConfigurationAndSWHardeningNeeded"],
}
TDX = {
    "measurements": [
        {
            "tee": "tdx",
            "mrtd": "91eb2b44d141d4ece09f0c75c2c53d247a3c68edd7fafe8a3520c942a604a407de03ae6dc5f87f27428b2538873118b7",
            "rtmr1": "0084452c01668329d4bc06acdf58a7205c26743304509973949e5619bf81a6a7aea8c323c173019b3093d54e579e9378",
            "rtmr2": "d833feef2cd945148aa38ead2c53e9b7f138190aaaebfc551dccd829fc207aa3ba80b70870d7330733642e01d48c3132",
            "rtmr3": "00" * 48,
        }
    ],
    "report_data": (
        "9a9d48e7f6799642d3d1b34e1e5e1742d4bb02dd6ddd551862c1211d35c304f9"
        "eca3efdbb481601c163cf52493d6e44aed55d51ec39b7e518fadb92c2b523f20"
    ),
    "allow_dynamic_platform": True,
    "allow_cached_keys": True,
    "allow_smt": True,
    "allow_unpinned_rtmr0": True,
    "allow_zero_registers": True,
}
SNP = {
    "measurements": [
        {
            "tee": "sev-snp",
            "measurement": (
                "b07af9620f3b839b47996422ddec6058338951d984e312115131ea82705eaf5b6bdf8a9ece31a5a608eb0cf2e4872b01"
            ),
        }
    ],
    "report_data": "0102030405" + "00" * 59,
    "snp_minimum_tcb": {"bootloader": 2, "tee": 0, "snp": 5, "microcode": 68},
    "allow_smt": True,
}

# Our own PKI

KEY = Ed25519PrivateKey.generate()


def statement(**changes: Any) -> Statement:
    values: dict[str, Any] = {
        "signing_key": KEY.public_key().public_bytes_raw(),
        "encryption_key": bytes(32),
        "bundle_digest": b"\x22" * 32,
        "configuration": json.dumps({"model": "fides", "bundle_version": 3, "clients": []}),
        "boot_id": b"\x44" * 16,
        "issued_at": int(NOW_S) - 60,
        "challenge": b"",
    }
    return Statement(**{**values, **changes})


def policy(tee: str, **changes: Any) -> EvidencePolicy:
    values: dict[str, Any] = {
        "measurements": [measurement_of(tee)],
        "models": {"fides": {"bundle_digests": ["22" * 32]}},
        "allow_any_client": True,
        "snp_minimum_tcb": SnpTcb(bootloader=3, tee=0, snp=20, microcode=209),
    }
    return EvidencePolicy.model_validate({**values, **changes})


def evidence_for(tee: str, intel: IntelPki, amd: AmdPki, what: Statement, **options: Any) -> Evidence:
    if tee == "sev-snp":
        return Evidence(tee, amd.report(what.report_data(), **options), what, vcek=amd.vcek, chain=amd.chain)
    quote = intel.quote(tee, what.report_data(), **options)
    assert tee in ("sgx", "tdx")
    return Evidence(tee, quote, what, collateral=intel.collateral(tee))  # type: ignore[arg-type]


TEES = ["sgx", "tdx", "sev-snp"]
