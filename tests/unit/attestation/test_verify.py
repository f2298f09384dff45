"""Our own PKI for every TEE, the full path key -> evidence -> receipt, and everything that must be refused."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fides_plugins.attestation import development
from fides_plugins.attestation.cose import key_id
from fides_plugins.attestation.evidence import Evidence, Tee
from fides_plugins.attestation.policy import EvidencePolicy, SnpTcb
from fides_plugins.attestation.receipt import open_receipt
from fides_plugins.attestation.refusal import Refusal
from fides_plugins.attestation.verify import InsecureEvidenceWarning, TrustRoots, new_challenge, verify_evidence
from tests.support.evidence import KEY, TEES, evidence_for, policy, refusal, statement
from tests.support.pki import NOW_S, AmdPki, IntelPki, measurement_of, pem, roots_of
from tests.support.receipts import sample_receipt

# AMD issues VCEKs with serial number 0, which `cryptography` warns about.
pytestmark = pytest.mark.filterwarnings("ignore:Parsed a serial number")


@pytest.mark.parametrize("tee", TEES)
def test_from_key_over_evidence_to_receipt(tee: str, intel: IntelPki, amd: AmdPki) -> None:
    document = evidence_for(tee, intel, amd, statement()).to_json()
    trusted = verify_evidence(Evidence.from_json(document), policy(tee), NOW_S, roots=roots_of(intel, amd))
    assert trusted.statement is not None
    assert not trusted.development
    signed_by = trusted.statement.key_id
    assert signed_by == key_id(KEY.public_key().public_bytes_raw())
    receipt = sample_receipt(tee=tee)
    opened = open_receipt(receipt.sign(KEY, signed_by), {signed_by: trusted.signing_key})
    assert opened.key_id == trusted.statement.key_id
    stranger = Ed25519PrivateKey.generate()
    with pytest.raises(Refusal, match="signature"):
        open_receipt(receipt.sign(stranger, signed_by), {signed_by: trusted.signing_key})


@pytest.mark.parametrize("tee", TEES)
@pytest.mark.parametrize(
    "change",
    [
        {"signing_key": bytes(32)},
        {"encryption_key": b"\x01" * 32},
        {"bundle_digest": b"\x23" * 32},
        {"configuration": json.dumps({"bundle_version": 9})},
        {"boot_id": b"\x45" * 16},
        {"issued_at": int(NOW_S)},
        {"challenge": bytes(32)},
    ],
)
def test_nothing_in_the_statement_can_be_exchanged(
    tee: str, change: dict[str, Any], intel: IntelPki, amd: AmdPki
) -> None:
    honest = evidence_for(tee, intel, amd, statement())
    forged = dataclasses.replace(honest, statement=dataclasses.replace(statement(), **change))
    assert refusal(forged, policy(tee), roots=roots_of(intel, amd)) == "evidence-report-data"


@pytest.mark.parametrize("tee", TEES)
@pytest.mark.parametrize(
    "nothing",
    [
        {"measurements": []},
        {"models": {}},
        # A policy that names no client would trust a verifier that answers the host.
        {"allow_any_client": False},
        {"measurements": [], "models": {}, "allow_any_client": False, "snp_minimum_tcb": None},
    ],
)
def test_policies_are_closed_on_empty(tee: str, nothing: dict[str, Any], intel: IntelPki, amd: AmdPki) -> None:
    evidence = evidence_for(tee, intel, amd, statement())
    assert refusal(evidence, policy(tee, **nothing), roots=roots_of(intel, amd)) == "policy-empty"


@pytest.mark.parametrize("tee", TEES)
def test_a_bare_report_vouches_for_no_key_even_where_it_is_accepted(tee: str, intel: IntelPki, amd: AmdPki) -> None:
    bare = dataclasses.replace(evidence_for(tee, intel, amd, statement()), statement=None)
    assert refusal(bare, policy(tee), roots=roots_of(intel, amd)) == "evidence-report-data"
    loose = verify_evidence(bare, policy(tee, allow_unbound_report_data=True), NOW_S, roots=roots_of(intel, amd))
    with pytest.raises(Refusal, match="vouches for no key"):
        loose.signing_key


@pytest.mark.parametrize("tee", TEES)
@pytest.mark.parametrize(
    ("demands", "options", "code"),
    [
        ({"models": {"other": {"bundle_digests": ["22" * 32]}}}, {}, "evidence-model"),
        ({"models": {"fides": {"bundle_digests": ["33" * 32]}}}, {}, "evidence-bundle"),
        (
            {"models": {"fides": {"bundle_digests": ["22" * 32], "minimum_bundle_version": 4}}},
            {},
            "evidence-bundle-version",
        ),
        ({"maximum_age_s": 10}, {}, "evidence-age"),
        ({}, {"now": NOW_S - 3600}, "evidence-age"),
        ({"clients": ["aa" * 32]}, {}, "evidence-clients"),
        ({}, {"challenge": new_challenge()}, "evidence-challenge"),
    ],
)
def test_evidence_is_refused_for_the_reason_at_hand(
    tee: str, demands: dict[str, Any], options: dict[str, Any], code: str, intel: IntelPki, amd: AmdPki
) -> None:
    evidence = evidence_for(tee, intel, amd, statement())
    assert refusal(evidence, policy(tee, **demands), roots=roots_of(intel, amd), **options) == code


@pytest.mark.parametrize("tee", TEES)
def test_another_program_is_refused(tee: str, intel: IntelPki, amd: AmdPki) -> None:
    evidence, roots = evidence_for(tee, intel, amd, statement()), roots_of(intel, amd)
    another = [measurement_of(tee, "another")]
    assert refusal(evidence, policy(tee, measurements=another), roots=roots) == "evidence-measurement"
    elsewhere = [measurement_of(t) for t in TEES if t != tee]
    assert refusal(evidence, policy(tee, measurements=elsewhere), roots=roots) == "evidence-measurement"


@pytest.mark.parametrize("register", ["mrtd", "rtmr0", "rtmr1", "rtmr2", "rtmr3"])
def test_a_register_that_nothing_was_measured_into_needs_a_named_relaxation(
    register: str, intel: IntelPki, amd: AmdPki
) -> None:
    """An image that extends nothing pins nothing: whatever the host makes it run has the same zeros."""
    evidence, roots = evidence_for("tdx", intel, amd, statement(), zero=register), roots_of(intel, amd)
    pinned = [{**measurement_of("tdx"), register: "00" * 48}]
    assert refusal(evidence, policy("tdx", measurements=pinned), roots=roots) == "evidence-zero-register"
    relaxed = policy("tdx", measurements=pinned, allow_zero_registers=True)
    assert verify_evidence(evidence, relaxed, NOW_S, roots=roots).facts.measurements[register] == "00" * 48


def test_an_open_configuration_of_the_virtual_machine_needs_a_named_relaxation(intel: IntelPki, amd: AmdPki) -> None:
    evidence, roots = evidence_for("tdx", intel, amd, statement()), roots_of(intel, amd)
    full = measurement_of("tdx")
    open_ = {k: v for k, v in full.items() if k != "rtmr0"}
    assert refusal(evidence, policy("tdx", measurements=[open_]), roots=roots) == "evidence-rtmr0"
    relaxed = policy("tdx", measurements=[open_], allow_unpinned_rtmr0=True)
    assert verify_evidence(evidence, relaxed, NOW_S, roots=roots).facts.tee == "tdx"
    assert verify_evidence(evidence, policy("tdx", measurements=[open_, full]), NOW_S, roots=roots).facts.tee == "tdx"


@pytest.mark.parametrize("tee", TEES)
def test_the_vendors_roots_do_not_know_us(tee: str, intel: IntelPki, amd: AmdPki) -> None:
    assert refusal(evidence_for(tee, intel, amd, statement()), policy(tee)) in {"evidence-quote", "evidence-root"}


@pytest.mark.parametrize("tee", TEES)
def test_a_challenge_proves_the_age(tee: str, intel: IntelPki, amd: AmdPki) -> None:
    challenge = new_challenge()
    # The clock of this host is a day behind: only the challenge can say that the evidence is new.
    fresh = statement(challenge=challenge, issued_at=int(NOW_S) - 90_000)
    evidence, roots = evidence_for(tee, intel, amd, fresh), roots_of(intel, amd)
    assert verify_evidence(evidence, policy(tee), NOW_S, roots=roots, challenge=challenge).facts.tee == tee
    assert refusal(evidence, policy(tee), roots=roots) == "evidence-age"


@pytest.mark.parametrize("tee", ["sgx", "tdx"])
def test_debug_enclaves_are_refused(tee: str, intel: IntelPki, amd: AmdPki) -> None:
    evidence = evidence_for(tee, intel, amd, statement(), debug=True)
    assert refusal(evidence, policy(tee), roots=roots_of(intel, amd)) == "evidence-debug"


def test_out_of_date_platforms_need_a_named_relaxation(amd: AmdPki) -> None:
    old = IntelPki(tcb_status="OutOfDate")
    evidence, roots = evidence_for("tdx", old, amd, statement()), roots_of(old, amd)
    assert refusal(evidence, policy("tdx"), roots=roots) == "evidence-quote"
    allowed = policy("tdx", allowed_tcb_status=["OutOfDate"], out_of_date_grace_days=30)
    assert refusal(evidence, allowed, roots=roots) == "evidence-quote"  # five months old, 30 days allowed
    relaxed = policy("tdx", allowed_tcb_status=["OutOfDate"], out_of_date_grace_days=365)
    assert verify_evidence(evidence, relaxed, NOW_S, roots=roots).facts.tcb == "OutOfDate"
    names = ("allow_any_client", "out_of_date_grace_days:365", "allowed_tcb_status:OutOfDate")
    assert relaxed.relaxations() == names


def test_a_refusal_names_the_field_of_the_policy_that_would_accept_it(amd: AmdPki) -> None:
    cloud = IntelPki(dynamic_platform=True)
    evidence, roots = evidence_for("tdx", cloud, amd, statement()), roots_of(cloud, amd)
    given: dict[str, bool] = {}
    for field in ("allow_dynamic_platform", "allow_cached_keys", "allow_smt"):
        with pytest.raises(Refusal) as caught:
            verify_evidence(evidence, policy("tdx", **given), NOW_S, roots=roots)
        assert f"`{field}`" in caught.value.remedy
        given[field] = True
    verify_evidence(evidence, policy("tdx", **given), NOW_S, roots=roots)


@pytest.mark.parametrize(
    ("status", "changes", "field"),
    [
        ("OutOfDate", {}, "allowed_tcb_status"),
        ("ConfigurationNeeded", {}, "allowed_tcb_status"),
        ("OutOfDate", {"allowed_tcb_status": ["OutOfDate"], "out_of_date_grace_days": 30}, "out_of_date_grace_days"),
        ("UpToDate", {"minimum_tcb_evaluation": 18}, "minimum_tcb_evaluation"),
        ("Revoked", {}, ""),
    ],
)
def test_a_refusal_of_the_platforms_firmware_names_the_field(
    status: str, changes: dict[str, Any], field: str, amd: AmdPki
) -> None:
    intel = IntelPki(tcb_status=status)
    with pytest.raises(Refusal) as caught:
        verify_evidence(
            evidence_for("tdx", intel, amd, statement()), policy("tdx", **changes), NOW_S, roots=roots_of(intel, amd)
        )
    assert caught.value.code == "evidence-quote"
    assert (f"`{field}`" in caught.value.remedy) if field else caught.value.remedy == ""


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"guest_policy": 1 << 17 | 1 << 19}, "evidence-debug"),
        ({"guest_policy": 1 << 17 | 1 << 18}, "evidence-platform"),
        ({"guest_policy": 1 << 17 | 1 << 16, "platform": 1}, "evidence-platform"),
        ({"vmpl": 1}, "evidence-vmpl"),
        ({"version": 6}, "evidence-malformed"),
        ({"version": 1}, "evidence-malformed"),
        ({"chip_id": b"\xee" * 64}, "evidence-chip"),
        ({"chip_id": bytes(64)}, "evidence-chip"),
        ({"levels": (3, 0, 21, 209)}, "evidence-tcb"),
        ({"flags": 1 << 2}, "evidence-platform"),
    ],
)
def test_snp_reports_are_refused(options: dict[str, Any], code: str, intel: IntelPki, amd: AmdPki) -> None:
    evidence = evidence_for("sev-snp", intel, amd, statement(), **options)
    assert refusal(evidence, policy("sev-snp"), roots=roots_of(intel, amd)) == code


@pytest.mark.parametrize("floor", [SnpTcb(bootloader=3, tee=0, snp=20, microcode=210), None])
def test_snp_platforms_need_a_floor_and_reach_it(floor: SnpTcb | None, intel: IntelPki, amd: AmdPki) -> None:
    evidence = evidence_for("sev-snp", intel, amd, statement())
    demanding = policy("sev-snp", snp_minimum_tcb=floor)
    assert refusal(evidence, demanding, roots=roots_of(intel, amd)) == "evidence-tcb"


def test_snp_roots_are_those_of_the_generation(intel: IntelPki, amd: AmdPki) -> None:
    evidence = evidence_for("sev-snp", intel, amd, statement())
    unknown = TrustRoots(amd={"Turin": "00" * 32})
    assert refusal(evidence, policy("sev-snp"), roots=unknown) == "evidence-root"
    renamed = TrustRoots(amd={"Genoa": next(iter(amd.roots.values()))})
    assert refusal(evidence, policy("sev-snp"), roots=renamed) == "evidence-chip"


def test_snp_chains_are_checked(intel: IntelPki, amd: AmdPki) -> None:
    evidence, roots = evidence_for("sev-snp", intel, amd, statement()), roots_of(intel, amd)
    crossed = pem(AmdPki(ark_key=amd.ark_key).ask, amd.ark)
    for change in ({"chain": crossed}, {"chain": ""}, {"vcek": b""}):
        broken = dataclasses.replace(evidence, **change)
        assert refusal(broken, policy("sev-snp"), roots=roots) == "evidence-certificate"
    assert refusal(evidence, policy("sev-snp"), NOW_S + 400 * 86400, roots=roots) == "evidence-expired"


@pytest.mark.parametrize("position", [0x50, 0x90, 672, 672 + 60, 672 + 72, 672 + 150, 1183])
def test_snp_reports_are_signed_to_the_last_byte(position: int, intel: IntelPki, amd: AmdPki) -> None:
    evidence = evidence_for("sev-snp", intel, amd, statement())
    changed = bytearray(evidence.report)
    changed[position] ^= 1
    altered = dataclasses.replace(evidence, report=bytes(changed))
    assert refusal(altered, policy("sev-snp"), roots=roots_of(intel, amd)) == "evidence-signature"


# Development evidence


MADE_UP = Evidence("development", development.make_report(statement().report_data()), statement())
TRUSTING = policy("tdx", measurements=[])


def test_development_evidence_needs_the_insecure_flag_and_warns() -> None:
    assert refusal(MADE_UP, TRUSTING) == "evidence-development"
    with pytest.warns(InsecureEvidenceWarning, match="nothing is protected"):
        assert verify_evidence(MADE_UP, TRUSTING, NOW_S, insecure_development=True).development


@pytest.mark.filterwarnings("ignore::fides_plugins.attestation.verify.InsecureEvidenceWarning")
@pytest.mark.parametrize(
    ("change", "demands", "code"),
    [
        ({}, EvidencePolicy(), "policy-empty"),
        ({"statement": statement(boot_id=bytes(16))}, TRUSTING, "evidence-report-data"),
        ({"report": b""}, TRUSTING, "evidence-malformed"),
        ({"report": MADE_UP.report[:-1]}, TRUSTING, "evidence-malformed"),
        ({"report": bytes(len(MADE_UP.report))}, TRUSTING, "evidence-malformed"),
        ({"report": MADE_UP.report[:-1] + bytes((MADE_UP.report[-1] ^ 1,))}, TRUSTING, "evidence-signature"),
    ],
)
def test_the_insecure_flag_relaxes_the_hardware_alone(
    change: dict[str, Any], demands: EvidencePolicy, code: str
) -> None:
    assert refusal(dataclasses.replace(MADE_UP, **change), demands, insecure_development=True) == code


@pytest.mark.parametrize("tee", TEES)
def test_development_evidence_does_not_pass_as_hardware(tee: Tee, intel: IntelPki, amd: AmdPki) -> None:
    posing = dataclasses.replace(MADE_UP, tee=tee)
    assert refusal(posing, policy(tee), roots=roots_of(intel, amd)) == "evidence-malformed"
    real = dataclasses.replace(evidence_for(tee, intel, amd, statement()), tee="development")
    with pytest.warns(InsecureEvidenceWarning):
        assert refusal(real, policy(tee), insecure_development=True) == "evidence-malformed"


def test_evidence_of_one_tee_does_not_pass_as_another(intel: IntelPki, amd: AmdPki) -> None:
    swapped = dataclasses.replace(evidence_for("tdx", intel, amd, statement()), tee="sgx")
    assert refusal(swapped, policy("sgx"), roots=roots_of(intel, amd)) == "evidence-malformed"
