"""The public sample evidence: trusted inside its window, and refused when anything about it is changed."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from fides_plugins.attestation.evidence import Evidence
from fides_plugins.attestation.policy import EvidencePolicy
from fides_plugins.attestation.refusal import Refusal
from fides_plugins.attestation.verify import TrustRoots, sniff, verify_evidence
from tests.support.evidence import SAMPLES, SGX, SNP, TDX, at, needs_samples, refusal

# AMD issues VCEKs with serial number 0, which `cryptography` warns about.
pytestmark = pytest.mark.filterwarnings("ignore:Parsed a serial number")


def sample(tee: str) -> Evidence:
    if tee == "sev-snp":
        return Evidence(
            tee="sev-snp",
            report=(SAMPLES / "snp_milan_report.bin").read_bytes(),
            vcek=(SAMPLES / "snp_milan_vcek.der").read_bytes(),
            chain=(SAMPLES / "ask_ark_milan.pem").read_text(),
        )
    evidence = sniff((SAMPLES / f"{tee}_quote").read_bytes())
    assert evidence.tee == tee
    return dataclasses.replace(evidence, collateral=(SAMPLES / f"{tee}_quote_collateral.json").read_text())


@needs_samples
@pytest.mark.parametrize(
    ("tee", "policy", "status"),
    [
        ("sgx", SGX, "ConfigurationAndSWHardeningNeeded"),
        ("tdx", TDX, "UpToDate"),
    ],
)
def test_intel_samples_verify_inside_their_window_only(tee: str, policy: dict[str, Any], status: str) -> None:
    trusted = EvidencePolicy.model_validate(policy)
    facts = verify_evidence(sample(tee), trusted, at("2025-07-01")).facts
    assert facts.tee == tee
    assert facts.tcb == status
    assert refusal(sample(tee), trusted, at("2025-06-18")) == "evidence-quote"
    assert refusal(sample(tee), trusted, at("2025-07-20")) == "evidence-quote"
    assert refusal(sample(tee), trusted.model_copy(update={"report_data": "00" * 64}), at("2025-07-01")) == (
        "evidence-report-data"
    )
    assert refusal(sample(tee), trusted.model_copy(update={"report_data": None}), at("2025-07-01")) == (
        "evidence-report-data"
    )
    assert refusal(dataclasses.replace(sample(tee), collateral=""), trusted, at("2025-07-01")) == "evidence-collateral"


@needs_samples
@pytest.mark.parametrize(("tee", "policy", "signed"), [("sgx", SGX, 432), ("tdx", TDX, 632)])
def test_flipped_bytes_of_a_quote_are_refused(tee: str, policy: dict[str, Any], signed: int) -> None:
    trusted = EvidencePolicy.model_validate(policy)
    evidence = sample(tee)
    identity = verify_evidence(evidence, trusted, at("2025-07-01")).facts.evidence_id
    # What the attestation key signed, its signature and its public key. The length between is not signed.
    for position in (*range(signed), *range(signed + 4, signed + 4 + 128)):
        changed = bytearray(evidence.report)
        changed[position] ^= 1
        assert refusal(dataclasses.replace(evidence, report=bytes(changed)), trusted, at("2025-07-01")) in {
            "evidence-quote",
            "evidence-malformed",
            "evidence-debug",
        }
    # Bytes behind the quote change nothing that was signed, so they may not change what it is called.
    longer = dataclasses.replace(evidence, report=evidence.report + b"\n")
    assert verify_evidence(longer, trusted, at("2025-07-01")).facts.evidence_id == identity


@needs_samples
@pytest.mark.parametrize(
    ("relaxation", "code"),
    [
        ("allow_dynamic_platform", "evidence-quote"),
        ("allow_cached_keys", "evidence-quote"),
        ("allow_smt", "evidence-quote"),
        ("allow_unpinned_rtmr0", "evidence-rtmr0"),
        ("allow_zero_registers", "evidence-zero-register"),
    ],
)
def test_cloud_tdx_needs_each_relaxation_by_name(relaxation: str, code: str) -> None:
    policy = EvidencePolicy.model_validate({**TDX, relaxation: False})
    assert relaxation not in policy.relaxations()
    assert refusal(sample("tdx"), policy, at("2025-07-01")) == code


@needs_samples
def test_sgx_sample_needs_its_tcb_status_allowed() -> None:
    policy = EvidencePolicy.model_validate({**SGX, "allowed_tcb_status": []})
    assert refusal(sample("sgx"), policy, at("2025-07-01")) == "evidence-quote"
    rejecting = EvidencePolicy.model_validate({**SGX, "rejected_advisories": ["INTEL-SA-00615"]})
    with pytest.raises(Refusal, match="`rejected_advisories`"):
        verify_evidence(sample("sgx"), rejecting, at("2025-07-01"))


@needs_samples
def test_snp_sample_verifies_and_is_refused_as_a_debug_guest() -> None:
    policy = EvidencePolicy.model_validate(SNP)
    assert refusal(sample("sev-snp"), policy, at("2025-07-01")) == "evidence-debug"
    relaxed = policy.model_copy(update={"allow_snp_debug": True})
    assert verify_evidence(sample("sev-snp"), relaxed, at("2025-07-01")).facts.tcb.startswith("Milan")
    assert refusal(sample("sev-snp"), relaxed, at("2050-01-01")) == "evidence-expired"


@needs_samples
def test_snp_sample_agrees_with_an_independent_verifier() -> None:
    omne = pytest.importorskip("omne_attest.snp", reason="omne-attest is not installed")
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import Encoding

    evidence = sample("sev-snp")
    ask, ark = (c.public_bytes(Encoding.DER) for c in x509.load_pem_x509_certificates(evidence.chain.encode()))
    pinned = bytes.fromhex(TrustRoots().amd["Milan"])
    loose, strict = omne.Policy(reject_debug=False), omne.Policy()
    relaxed = EvidencePolicy.model_validate({**SNP, "allow_snp_debug": True})
    omne.verify(evidence.report, evidence.vcek, ask, ark, pinned, loose)
    with pytest.raises(omne.Fail, match="debug"):
        omne.verify(evidence.report, evidence.vcek, ask, ark, pinned, strict)
    for position in range(0, 768, 7):
        changed = bytearray(evidence.report)
        changed[position] ^= 1
        if not 0x2A0 + 48 <= position < 0x2E8:  # the other verifier does not look at the padding
            with pytest.raises(omne.Fail):
                omne.verify(bytes(changed), evidence.vcek, ask, ark, pinned, loose)
        assert refusal(dataclasses.replace(evidence, report=bytes(changed)), relaxed, at("2025-07-01"))
