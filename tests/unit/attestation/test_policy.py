"""Evidence policies: what they demand, and that their page says the same."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from fides_plugins.attestation.policy import ClientSetRule, EvidencePolicy, Measurement, ModelRule, SnpTcb
from fides_plugins.attestation.verify import verify_evidence
from fides_plugins.errors import SettingsError
from tests.support.docs_blocks import blocks
from tests.support.evidence import evidence_for, policy, refusal, statement
from tests.support.paths import REPOSITORY
from tests.support.pki import NOW_S, AmdPki, IntelPki, measurement_of, register, roots_of

# AMD issues VCEKs with serial number 0, which `cryptography` warns about.
pytestmark = pytest.mark.filterwarnings("ignore:Parsed a serial number")


@pytest.mark.parametrize("missing", ["mrtd", "rtmr1", "rtmr2", "rtmr3"])
def test_a_measurement_must_pin_the_whole_program(missing: str) -> None:
    full = measurement_of("tdx")
    with pytest.raises(ValueError, match="must give mrtd, rtmr1, rtmr2, rtmr3"):
        EvidencePolicy.model_validate({"measurements": [{k: v for k, v in full.items() if k != missing}]})


def test_a_signer_alone_names_no_program() -> None:
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
    path.write_text('[evidence.models.digits]\nbundle_digests = ["AB CD"]\n')
    assert EvidencePolicy.from_toml(path).models["digits"].bundle_digests == ("abcd",)
    path.write_text("[evidence.models.digits]\nbundle_digests = []\n")
    with pytest.raises(SettingsError, match="digits"):
        EvidencePolicy.from_toml(path)


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
    rules, rest = PAGE.read_text().split("## A model")[1].split("## A set of clients")
    chosen, rest = rest.split("## A measurement")
    measurement, tcb = rest.split("## Patch levels")
    tables = ((rules, ModelRule), (chosen, ClientSetRule), (measurement, Measurement), (tcb, SnpTcb))
    for part, model in tables:
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
    assert example.models
    assert example.clients
