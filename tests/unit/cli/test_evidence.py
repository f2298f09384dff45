"""`fides evidence verify` from a shell."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fides_plugins.attestation import development
from fides_plugins.attestation.evidence import Evidence
from fides_plugins.cli import app
from tests.support.evidence import SAMPLES, SGX, SNP, TDX, TEES, needs_samples, statement
from tests.support.pki import NOW_S

# AMD issues VCEKs with serial number 0, which `cryptography` warns about.
pytestmark = pytest.mark.filterwarnings("ignore:Parsed a serial number")


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
@pytest.mark.parametrize(
    ("tee", "report", "options", "values"),
    [
        ("sgx", "sgx_quote", {"--collateral": "sgx_quote_collateral.json"}, SGX),
        ("tdx", "tdx_quote", {"--collateral": "tdx_quote_collateral.json"}, TDX),
        (
            "sev-snp",
            "snp_milan_report.bin",
            {"--vcek": "snp_milan_vcek.der", "--chain": "ask_ark_milan.pem"},
            {**SNP, "allow_snp_debug": True},
        ),
    ],
    ids=TEES,
)
def test_evidence_verify_from_a_shell(
    tee: str, report: str, options: dict[str, str], values: dict[str, Any], tmp_path: Path
) -> None:
    files = [str(SAMPLES / report), *(part for flag, name in options.items() for part in (flag, str(SAMPLES / name)))]
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
    rules.write_text(f'[evidence]\nallow_any_client = true\nmodels.fides.bundle_digests = ["{"22" * 32}"]\n')
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
