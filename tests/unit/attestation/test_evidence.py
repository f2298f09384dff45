"""Evidence documents: what is no document is refused before anything in it is believed."""

from __future__ import annotations

import json

import pytest

from fides_plugins.attestation.evidence import Evidence
from fides_plugins.attestation.refusal import Refusal
from tests.support.evidence import evidence_for, statement
from tests.support.pki import AmdPki, IntelPki

# AMD issues VCEKs with serial number 0, which `cryptography` warns about.
pytestmark = pytest.mark.filterwarnings("ignore:Parsed a serial number")


@pytest.mark.parametrize("text", ["", "{}", "[]", "{", '{"profile": "x"}', " " * (1 << 21)])
def test_documents_of_another_form_are_refused(text: str) -> None:
    with pytest.raises(Refusal) as caught:
        Evidence.from_json(text)
    assert caught.value.code == "evidence-malformed"


@pytest.mark.parametrize("change", [{"extra": 1}, {"report": "not base64!"}, {"tee": "nitro"}])
def test_documents_with_wrong_fields_are_refused(change: dict[str, object], intel: IntelPki, amd: AmdPki) -> None:
    good = json.loads(evidence_for("tdx", intel, amd, statement()).to_json())
    with pytest.raises(Refusal, match="evidence document"):
        Evidence.from_json(json.dumps({**good, **change}))


@pytest.mark.parametrize("change", [{"boot_id": "00"}, {"issued_at": "1"}, {"signing_key": "zz" * 32}])
def test_statements_with_wrong_fields_are_refused(change: dict[str, str], intel: IntelPki, amd: AmdPki) -> None:
    good = json.loads(evidence_for("tdx", intel, amd, statement()).to_json())
    with pytest.raises(Refusal, match="evidence document"):
        Evidence.from_json(json.dumps({**good, "statement": {**good["statement"], **change}}))
