"""Evidence documents, policies, and `fides evidence verify` from a shell."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fides_plugins.attestation import development
from fides_plugins.attestation.evidence import Evidence
from fides_plugins.attestation.policy import EvidencePolicy, Measurement, SnpTcb
from fides_plugins.attestation.refusal import Refusal
from fides_plugins.attestation.verify import verify_evidence
from fides_plugins.cli import app
from fides_plugins.errors import SettingsError
from tests.support.docs_blocks import REPOSITORY, blocks
from tests.support.evidence import SAMPLES, SGX, SNP, TDX, evidence_for, needs_samples, policy, refusal, statement
from tests.support.pki import NOW_S, AmdPki, IntelPki, measurement_of, register, roots_of

# AMD issues VCEKs with serial number 0, which `cryptography` warns about.
pytestmark = pytest.mark.filterwarnings("ignore:Parsed a serial number")


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
    with pytest.raises(SettingsError, match=r"allow_everything.*reference/evidence-policy\.md"):
        EvidencePolicy.from_toml(path)
    path.write_text('[evidence]\nbundle_digests = ["AB CD"]\n')
    assert EvidencePolicy.from_toml(path).bundle_digests == ("abcd",)


PAGE = REPOSITORY / "docs" / "reference" / "evidence-policy.md"


def documented(*sections: str) -> dict[str, str]:
    """Field to its third column, the default where there is one, of the tables in these sections of the page."""
    text = PAGE.read_text()
    found: dict[str, str] = {}
    for section in sections:
        part = text.split(f"\n## {section}\n")[1].split("\n## ")[0]
        found |= dict(re.findall(r"^\| `(\w+)` \|[^|]*\| ([^|]*) \|", part, re.MULTILINE))
    return found


def test_the_page_names_every_field_with_its_default() -> None:
    fields = {**documented("Demands"), **documented("Relaxations")}
    assert set(fields) == set(EvidencePolicy.model_fields)
    for name, field in EvidencePolicy.model_fields.items():
        default = field.default
        shown = "none" if default is None else json.dumps(int(default) if isinstance(default, float) else default)
        assert fields[name].strip("`") == shown, name
    rest = PAGE.read_text().split("## A measurement")[1]
    measurement, tcb = rest.split("## Patch levels")
    for part, model in ((measurement, Measurement), (tcb, SnpTcb)):
        assert set(re.findall(r"^\| `(\w+)` \|", part, re.MULTILINE)) == set(model.model_fields)


def test_the_page_lists_as_relaxations_what_the_policy_reports_as_such() -> None:
    relaxed = {name: True for name in EvidencePolicy.model_fields if name.startswith("allow_")}
    given = {**relaxed, "out_of_date_grace_days": 1, "allowed_tcb_status": ["OutOfDate"]}
    reported = {r.split(":")[0] for r in EvidencePolicy.model_validate(given).relaxations()}
    assert set(documented("Relaxations")) == reported


def test_the_example_on_the_page_is_a_policy(tmp_path: Path) -> None:
    (block,) = (b for b in blocks(PAGE) if b.language == "toml")
    path = tmp_path / "policy.toml"
    path.write_text(block.text)
    example = EvidencePolicy.from_toml(path)
    assert {m.tee for m in example.measurements} == {"sgx", "tdx", "sev-snp"}
    assert example.relaxations() == ("allow_dynamic_platform", "allow_cached_keys", "allow_smt")
    assert example.bundle_digests
    assert example.clients


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
    rules.write_text(f'[evidence]\nbundle_digests = ["{"22" * 32}"]\nallow_any_client = true\n')
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
