"""Evidence: the public samples, our own PKI for every TEE, and everything that must be refused."""

from __future__ import annotations

import dataclasses
import datetime
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from typer.testing import CliRunner

from fides_plugins.attestation import development
from fides_plugins.attestation.evidence import Evidence, Statement
from fides_plugins.attestation.keys import key_id, raw_public
from fides_plugins.attestation.policy import EvidencePolicy, SnpTcb
from fides_plugins.attestation.receipt import open_receipt
from fides_plugins.attestation.refusal import Refusal
from fides_plugins.attestation.verify import (
    InsecureEvidenceWarning,
    TrustRoots,
    new_challenge,
    sniff,
    verify_evidence,
)
from fides_plugins.cli import app
from fides_plugins.errors import SettingsError
from tests.pki import NOW_S, AmdPki, IntelPki, measurement_of, pem, register, roots_of
from tests.receipts import sample_receipt

SAMPLES = Path(__file__).parents[3] / "shared" / "data" / "attestation"
needs_samples = pytest.mark.skipif(not SAMPLES.is_dir(), reason="the public sample evidence is not here")
# AMD issues VCEKs with serial number 0, which `cryptography` warns about.
pytestmark = pytest.mark.filterwarnings("ignore:Parsed a serial number")


def at(day: str) -> float:
    return datetime.datetime.fromisoformat(f"{day}T00:00:00+00:00").timestamp()


def refusal(evidence: Evidence, policy: EvidencePolicy, now: float = NOW_S, **options: Any) -> str:
    with pytest.raises(Refusal) as caught:
        verify_evidence(evidence, policy, now, **options)
    return caught.value.code


# The public samples

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
@pytest.mark.parametrize("relaxation", ["allow_dynamic_platform", "allow_cached_keys", "allow_smt"])
def test_cloud_tdx_needs_each_relaxation_by_name(relaxation: str) -> None:
    policy = EvidencePolicy.model_validate({**TDX, relaxation: False})
    assert relaxation not in policy.relaxations()
    assert refusal(sample("tdx"), policy, at("2025-07-01")) == "evidence-quote"


@needs_samples
def test_sgx_sample_needs_its_tcb_status_allowed() -> None:
    policy = EvidencePolicy.model_validate({**SGX, "allowed_tcb_status": []})
    assert refusal(sample("sgx"), policy, at("2025-07-01")) == "evidence-quote"
    rejecting = EvidencePolicy.model_validate({**SGX, "rejected_advisories": ["INTEL-SA-00615"]})
    assert refusal(sample("sgx"), rejecting, at("2025-07-01")) == "evidence-quote"


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


# Our own PKI: the full path key -> evidence -> receipt


@pytest.fixture(scope="module")
def intel() -> IntelPki:
    return IntelPki()


@pytest.fixture(scope="module")
def amd() -> AmdPki:
    return AmdPki()


KEY = Ed25519PrivateKey.generate()


def statement(**changes: Any) -> Statement:
    values: dict[str, Any] = {
        "signing_key": raw_public(KEY.public_key()),
        "encryption_key": bytes(32),
        "bundle_digest": b"\x22" * 32,
        "configuration": json.dumps({"bundle_version": 3, "clients": []}),
        "boot_id": b"\x44" * 16,
        "issued_at": int(NOW_S) - 60,
    }
    return Statement(**{**values, **changes})


def policy(tee: str, **changes: Any) -> EvidencePolicy:
    values: dict[str, Any] = {
        "measurements": [measurement_of(tee)],
        "bundle_digests": ["22" * 32],
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


@pytest.mark.parametrize("tee", TEES)
def test_from_key_over_evidence_to_receipt(tee: str, intel: IntelPki, amd: AmdPki) -> None:
    document = evidence_for(tee, intel, amd, statement()).to_json()
    trusted = verify_evidence(Evidence.from_json(document), policy(tee), NOW_S, roots=roots_of(intel, amd))
    assert trusted.statement is not None
    assert not trusted.development
    signed_by = trusted.statement.key_id
    assert signed_by == key_id(raw_public(KEY.public_key()))
    receipt = sample_receipt(tee=tee, evidence_id=trusted.facts.evidence_id)
    opened = open_receipt(receipt.sign(KEY, signed_by), {signed_by: trusted.signing_key})
    assert opened.evidence_id == trusted.facts.evidence_id
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
def test_policies_are_closed_on_empty(tee: str, intel: IntelPki, amd: AmdPki) -> None:
    evidence, roots = evidence_for(tee, intel, amd, statement()), roots_of(intel, amd)
    assert refusal(evidence, EvidencePolicy(), roots=roots) == "policy-empty"
    assert refusal(evidence, policy(tee, measurements=[]), roots=roots) == "policy-empty"
    assert refusal(evidence, policy(tee, bundle_digests=[]), roots=roots) == "policy-empty"
    bare = dataclasses.replace(evidence, statement=None)
    assert refusal(bare, policy(tee), roots=roots) == "evidence-report-data"
    loose = verify_evidence(bare, policy(tee, allow_unbound_report_data=True), NOW_S, roots=roots)
    with pytest.raises(Refusal, match="vouches for no key"):
        loose.signing_key


@pytest.mark.parametrize("tee", TEES)
def test_evidence_is_refused_for_the_reason_at_hand(tee: str, intel: IntelPki, amd: AmdPki) -> None:
    roots = roots_of(intel, amd)
    evidence = evidence_for(tee, intel, amd, statement())
    others = [t for t in TEES if t != tee]
    assert refusal(evidence, policy(tee, measurements=[measurement_of(tee, "another")]), roots=roots) == (
        "evidence-measurement"
    )
    assert refusal(evidence, policy(tee, measurements=[measurement_of(t) for t in others]), roots=roots) == (
        "evidence-measurement"
    )
    assert refusal(evidence, policy(tee, bundle_digests=["33" * 32]), roots=roots) == "evidence-bundle"
    assert refusal(evidence, policy(tee, minimum_bundle_version=4), roots=roots) == "evidence-bundle-version"
    assert refusal(evidence, policy(tee, maximum_age_s=10), roots=roots) == "evidence-age"
    assert refusal(evidence, policy(tee), NOW_S - 3600, roots=roots) == "evidence-age"
    assert refusal(evidence, policy(tee, clients=["aa" * 32]), roots=roots) == "evidence-clients"
    assert refusal(evidence, policy(tee), roots=roots, challenge=new_challenge()) == "evidence-challenge"
    # Real roots do not know us.
    assert refusal(evidence, policy(tee)) in {"evidence-quote", "evidence-root"}


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
    assert relaxed.relaxations() == ("out_of_date_grace_days:365", "allowed_tcb_status:OutOfDate")


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


def test_snp_platforms_and_chains_are_checked(intel: IntelPki, amd: AmdPki) -> None:
    evidence, roots = evidence_for("sev-snp", intel, amd, statement()), roots_of(intel, amd)
    floor = SnpTcb(bootloader=3, tee=0, snp=20, microcode=210)
    assert refusal(evidence, policy("sev-snp", snp_minimum_tcb=floor), roots=roots) == "evidence-tcb"
    assert refusal(evidence, policy("sev-snp", snp_minimum_tcb=None), roots=roots) == "evidence-tcb"
    unknown = TrustRoots(amd={"Turin": "00" * 32})
    assert refusal(evidence, policy("sev-snp"), roots=unknown) == "evidence-root"
    renamed = TrustRoots(amd={"Genoa": next(iter(amd.roots.values()))})
    assert refusal(evidence, policy("sev-snp"), roots=renamed) == "evidence-chip"
    other = AmdPki(ark_key=amd.ark_key)
    crossed = dataclasses.replace(evidence, chain=pem(other.ask, amd.ark))
    assert refusal(crossed, policy("sev-snp"), roots=roots) == "evidence-certificate"
    assert refusal(dataclasses.replace(evidence, vcek=b""), policy("sev-snp"), roots=roots) == "evidence-certificate"
    assert refusal(dataclasses.replace(evidence, chain=""), policy("sev-snp"), roots=roots) == "evidence-certificate"
    assert refusal(evidence, policy("sev-snp"), NOW_S + 400 * 86400, roots=roots) == "evidence-expired"
    for position in (0x50, 0x90, 672, 672 + 60, 672 + 72, 672 + 150, 1183):
        changed = bytearray(evidence.report)
        changed[position] ^= 1
        altered = dataclasses.replace(evidence, report=bytes(changed))
        assert refusal(altered, policy("sev-snp"), roots=roots) == "evidence-signature"


# Development evidence


def test_development_evidence_needs_the_insecure_flag_and_warns() -> None:
    what = statement()
    evidence = Evidence("development", development.make_report(what.report_data()), what)
    trusting = EvidencePolicy(bundle_digests=("22" * 32,))
    assert refusal(evidence, trusting) == "evidence-development"
    with pytest.warns(InsecureEvidenceWarning, match="nothing is protected"):
        assert verify_evidence(evidence, trusting, NOW_S, insecure_development=True).development
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InsecureEvidenceWarning)
        # The flag relaxes the hardware, not the rest of the policy.
        assert refusal(evidence, EvidencePolicy(), insecure_development=True) == "policy-empty"
        forged = dataclasses.replace(evidence, statement=dataclasses.replace(what, boot_id=bytes(16)))
        assert refusal(forged, trusting, insecure_development=True) == "evidence-report-data"
        for report in (b"", evidence.report[:-1], bytes(len(evidence.report))):
            broken = dataclasses.replace(evidence, report=report)
            assert refusal(broken, trusting, insecure_development=True) == "evidence-malformed"
        changed = evidence.report[:-1] + bytes((evidence.report[-1] ^ 1,))
        assert refusal(dataclasses.replace(evidence, report=changed), trusting, insecure_development=True) == (
            "evidence-signature"
        )


def test_development_evidence_does_not_pass_as_hardware(intel: IntelPki, amd: AmdPki) -> None:
    what = statement()
    for tee in TEES:
        posing = Evidence(tee, development.make_report(what.report_data()), what)  # type: ignore[arg-type]
        assert refusal(posing, policy(tee), roots=roots_of(intel, amd)) == "evidence-malformed"
        real = dataclasses.replace(evidence_for(tee, intel, amd, what), tee="development")
        with pytest.warns(InsecureEvidenceWarning):
            assert refusal(real, policy(tee), insecure_development=True) == "evidence-malformed"
    swapped = dataclasses.replace(evidence_for("tdx", intel, amd, what), tee="sgx")
    assert refusal(swapped, policy("sgx"), roots=roots_of(intel, amd)) == "evidence-malformed"


# Documents and policies


@pytest.mark.parametrize("text", ["", "{}", "[]", "{", '{"profile": "x"}', " " * (1 << 21)])
def test_documents_of_another_form_are_refused(text: str) -> None:
    with pytest.raises(Refusal) as caught:
        Evidence.from_json(text)
    assert caught.value.code == "evidence-malformed"


def test_documents_with_wrong_fields_are_refused(intel: IntelPki, amd: AmdPki) -> None:
    good = json.loads(evidence_for("tdx", intel, amd, statement()).to_json())
    for change in (
        {"extra": 1},
        {"report": "not base64!"},
        {"tee": "nitro"},
        {"statement": {**good["statement"], "boot_id": "00"}},
        {"statement": {**good["statement"], "issued_at": "1"}},
        {"statement": {**good["statement"], "signing_key": "zz" * 32}},
    ):
        with pytest.raises(Refusal, match="evidence document"):
            Evidence.from_json(json.dumps({**good, **change}))


def test_a_measurement_must_pin_the_whole_program() -> None:
    full = measurement_of("tdx")
    for missing in ("mrtd", "rtmr1", "rtmr2", "rtmr3"):
        with pytest.raises(ValueError, match="must give mrtd, rtmr1, rtmr2, rtmr3"):
            EvidencePolicy.model_validate({"measurements": [{k: v for k, v in full.items() if k != missing}]})
    with pytest.raises(ValueError, match="mrenclave or mrsigner"):
        EvidencePolicy.model_validate({"measurements": [{"tee": "sgx", "mrsigner": "00" * 32}]})


@pytest.mark.parametrize(("svn", "trusted"), [(3, True), (4, False)])
def test_a_signer_is_trusted_from_a_security_version_on(svn: int, trusted: bool, intel: IntelPki, amd: AmdPki) -> None:
    signer = {
        "tee": "sgx",
        "mrsigner": register("program", "mrsigner")[:32].hex(),
        "isv_prod_id": 1,
        "minimum_isv_svn": svn,
    }
    evidence, roots = evidence_for("sgx", intel, amd, statement()), roots_of(intel, amd)
    if trusted:
        verify_evidence(evidence, policy("sgx", measurements=[signer]), NOW_S, roots=roots)
    else:
        assert refusal(evidence, policy("sgx", measurements=[signer]), roots=roots) == "evidence-measurement"


def test_policies_refuse_unknown_keys(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_text("[evidence]\nallow_everything = true\n")
    with pytest.raises(SettingsError, match="allow_everything"):
        EvidencePolicy.from_toml(path)
    path.write_text('[evidence]\nbundle_digests = ["AB CD"]\n')
    assert EvidencePolicy.from_toml(path).bundle_digests == ("abcd",)


# The command line


def write_policy(path: Path, values: dict[str, Any]) -> Path:
    lines = ["[evidence]"]
    for name, value in values.items():
        if name == "measurements":
            continue
        if isinstance(value, dict):
            inner = ", ".join(f"{k} = {v}" for k, v in value.items())
            lines.append(f"{name} = {{ {inner} }}")
        else:
            lines.append(f"{name} = {json.dumps(value)}")
    for entry in values["measurements"]:
        lines += ["[[evidence.measurements]]", *(f"{k} = {json.dumps(v)}" for k, v in entry.items())]
    path.write_text("\n".join(lines) + "\n")
    return path


@needs_samples
@pytest.mark.parametrize(("tee", "values"), [("sgx", SGX), ("tdx", TDX), ("sev-snp", {**SNP, "allow_snp_debug": True})])
def test_evidence_verify_from_a_shell(tee: str, values: dict[str, Any], tmp_path: Path) -> None:
    if tee == "sev-snp":
        files = [str(SAMPLES / "snp_milan_report.bin"), "--vcek", str(SAMPLES / "snp_milan_vcek.der")]
        files += ["--chain", str(SAMPLES / "ask_ark_milan.pem")]
    else:
        files = [str(SAMPLES / f"{tee}_quote"), "--collateral", str(SAMPLES / f"{tee}_quote_collateral.json")]
    arguments = ["evidence", "verify", *files, "--policy", str(write_policy(tmp_path / "p.toml", values)), "--json"]
    good = CliRunner().invoke(app, [*arguments, "--now", "2025-07-01T00:00:00Z"])
    assert good.exit_code == 0, good.output
    answer = json.loads(good.stdout)
    assert answer["trusted"] is True
    assert answer["tee"] == tee
    late = CliRunner().invoke(app, [*arguments, "--now", "2046-01-01T00:00:00Z"])
    assert late.exit_code == 1, late.output
    refused = json.loads(late.stdout)
    assert refused["trusted"] is False
    assert refused["code"] in {"evidence-quote", "evidence-expired"}
    people = CliRunner().invoke(app, [a for a in arguments if a != "--json"] + ["--now", "2025-07-01T00:00:00Z"])
    assert people.exit_code == 0
    assert "trusted" in people.stdout


@needs_samples
def test_evidence_verify_without_a_policy_refuses() -> None:
    result = CliRunner().invoke(app, ["evidence", "verify", str(SAMPLES / "sgx_quote"), "--json"])
    assert result.exit_code == 1
    assert json.loads(result.stdout)["code"] == "policy-empty"


def test_evidence_verify_of_development_evidence(tmp_path: Path) -> None:
    what = statement(issued_at=int(NOW_S))
    path = tmp_path / "evidence.json"
    path.write_text(Evidence("development", development.make_report(what.report_data()), what).to_json())
    rules = tmp_path / "policy.toml"
    rules.write_text(f'[evidence]\nbundle_digests = ["{"22" * 32}"]\n')
    arguments = ["evidence", "verify", str(path), "--policy", str(rules), "--now", "2026-06-01T00:00:00Z", "--json"]
    refused = CliRunner().invoke(app, arguments)
    assert refused.exit_code == 1
    assert json.loads(refused.stdout)["code"] == "evidence-development"
    accepted = CliRunner().invoke(app, [*arguments, "--insecure-accept-development"])
    assert accepted.exit_code == 0
    assert "nothing is protected" in accepted.stderr


def test_evidence_verify_names_unusable_arguments(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"nonsense")
    result = CliRunner().invoke(app, ["evidence", "verify", str(path), "--now", "yesterday"])
    assert result.exit_code != 0
    assert "RFC 3339" in str(result.exception) + result.output
    broken = CliRunner().invoke(app, ["evidence", "verify", str(path), "--json"])
    assert broken.exit_code == 1
    assert json.loads(broken.stdout)["code"] == "evidence-malformed"
