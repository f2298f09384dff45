"""Sets of clients that an operator signs: what makes one good, and how somebody is removed without a new policy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from typer.testing import CliRunner

from fides_plugins.attestation.clients import ClientSet
from fides_plugins.attestation.evidence import Evidence
from fides_plugins.attestation.policy import EvidencePolicy
from fides_plugins.attestation.refusal import Refusal
from fides_plugins.attestation.request import from_text, to_text
from fides_plugins.attestation.verify import verify_evidence
from fides_plugins.cli import app
from fides_plugins.client.trust import Trust
from fides_plugins.enclave.verifier import VerifierOptions
from fides_plugins.errors import InputError
from fides_plugins.testing import memory_bundle
from tests.support.evidence import evidence_for, policy, refusal, statement
from tests.support.pki import NOW_S, AmdPki, IntelPki, roots_of
from tests.support.verifiers import Hardware

pytestmark = pytest.mark.filterwarnings("ignore:Parsed a serial number")
OPERATOR = Ed25519PrivateKey.from_private_bytes(b"the operator's identity in tests")
PUBLIC = OPERATOR.public_key().public_bytes_raw().hex()
STAYS, GOES = b"\x0a" * 32, b"\x0b" * 32
DAY = 86_400


def signed(*clients: bytes, operator: Ed25519PrivateKey = OPERATOR, **changes: Any) -> str:
    values = {"id": "prod", "serial": 2, "not_before": int(NOW_S) - DAY, "not_after": int(NOW_S) + DAY}
    return ClientSet(**{**values, **changes}, clients=clients or (STAYS, GOES)).sign(operator)


def configured(text: str, *clients: bytes) -> dict[str, Any]:
    keys = sorted(c.hex() for c in clients or (STAYS, GOES))
    configuration = {"model": "fides", "bundle_version": 3, "clients": keys, "client_set": text}
    return {"configuration": json.dumps(configuration)}


def asking(**changes: Any) -> EvidencePolicy:
    rule = {"id": "prod", "operator": PUBLIC, "minimum_serial": 2, **changes}
    return policy("tdx", client_set=rule, allow_any_client=False)


def test_a_signed_set_is_trusted_until_its_last_day(intel: IntelPki, amd: AmdPki) -> None:
    evidence = evidence_for("tdx", intel, amd, statement(**configured(signed())))
    trusted = verify_evidence(evidence, asking(), NOW_S, roots=roots_of(intel, amd))
    assert trusted.valid_until == NOW_S + DAY


def altered(text: str) -> str:
    data = bytearray(from_text(text, "client-set"))
    data[-80] ^= 1
    return to_text(bytes(data))


WRONG = {
    "none": configured(""),
    "nonsense": configured("nonsense"),
    "another operator's": configured(signed(operator=Ed25519PrivateKey.generate())),
    "another id": configured(signed(id="staging")),
    "an older one": configured(signed(serial=1)),
    "expired": configured(signed(not_after=int(NOW_S) - 1)),
    "not yet": configured(signed(not_before=int(NOW_S) + 1)),
    "altered": configured(altered(signed())),
    "not the one in force": configured(signed(), STAYS, GOES, b"\x0c" * 32),
}


@pytest.mark.parametrize("configuration", list(WRONG.values()), ids=list(WRONG))
def test_other_sets_are_refused(configuration: dict[str, Any], intel: IntelPki, amd: AmdPki) -> None:
    evidence = evidence_for("tdx", intel, amd, statement(**configuration))
    assert refusal(evidence, asking(), roots=roots_of(intel, amd)) == "evidence-clients"


def test_who_is_removed_stays_out_though_no_policy_changes(intel: IntelPki, amd: AmdPki) -> None:
    """The host has the removed client's key, and starts the verifier with the set that still knows it."""
    rules, roots = asking(), roots_of(intel, amd)
    old = evidence_for("tdx", intel, amd, statement(**configured(signed(not_after=int(NOW_S) + DAY))))
    new_set = configured(signed(STAYS, serial=3, not_after=int(NOW_S) + 9 * DAY), STAYS)
    later = NOW_S + DAY + 1
    new = evidence_for("tdx", intel, amd, statement(**new_set, issued_at=int(later)))
    assert verify_evidence(new, rules, later, roots=roots).facts.tee == "tdx"
    relaxed = rules.model_copy(update={"maximum_age_s": 10.0 * DAY})
    assert refusal(old, relaxed, later, roots=roots) == "evidence-clients"
    # Where that is too late, one number in the policies ends it at once.
    assert refusal(old, asking(minimum_serial=3), roots=roots) == "evidence-clients"


def test_held_evidence_ends_with_its_set() -> None:
    hardware, bundle, now = Hardware(), memory_bundle(), [NOW_S]
    options = VerifierOptions(clients=frozenset((STAYS, GOES)), client_set=signed(not_after=int(NOW_S) + 100))
    verifier = hardware.verifier(bundle, options=options)

    class Source:
        challenges = True

        def fetch(self, challenge: bytes) -> Evidence:
            return verifier.evidence(challenge)

    rule = {"id": "prod", "operator": PUBLIC}
    rules = hardware.policy(bundle, clients=[], client_set=rule)
    trust = Trust(rules, Source(), roots=hardware.roots, clock=lambda: now[0])
    trust.current()
    assert trust.keys()
    now[0] += 101
    assert trust.keys() == {}
    with pytest.raises(Refusal, match="does not hold now"):
        trust.current()


@pytest.mark.parametrize("change", [{"profile": "fides-clients/2"}, {"id": "x" * 200}, {"clients": [b"short"]}])
def test_what_an_operator_signs_must_be_a_set(change: dict[str, Any]) -> None:
    values = {"id": "prod", "serial": 2, "not_before": 0, "not_after": 1, "clients": (STAYS,), **change}
    with pytest.raises(Refusal) as caught:
        ClientSet.open(ClientSet(**values).sign(OPERATOR))
    assert caught.value.code == "client-set-fields"


def test_a_list_and_a_set_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="exclude each other"):
        policy("tdx", client_set={"id": "prod", "operator": PUBLIC}, clients=[STAYS.hex()])


def test_sets_are_signed_from_a_shell(tmp_path: Path) -> None:
    key, out = tmp_path / "operator.pem", tmp_path / "clients"
    public = CliRunner().invoke(app, ["new-identity", str(key)]).stdout.strip()
    command = ["sign-clients", str(key), "--out", str(out), "--id", "prod", "--serial", "4", "--days", "2"]
    made = CliRunner().invoke(app, [*command, "--client", STAYS.hex(), "--client", GOES.hex()])
    assert made.exit_code == 0, made.output
    found = ClientSet.open(out.read_text().strip())
    assert (found.operator.hex(), found.serial, found.clients) == (public, 4, (STAYS, GOES))
    assert 2 * DAY <= found.not_after - found.not_before < 2 * DAY + 600
    serve = ["serve-verifier", "--bundle", str(tmp_path), "--evidence", "development", "--client-set", str(out)]
    both = CliRunner().invoke(app, [*serve, "--client", STAYS.hex()])
    assert isinstance(both.exception, InputError)
    assert "exclude each other" in str(both.exception)
    # A file that holds no set must not open the verifier to everybody.
    for text in ("", "\n", STAYS.hex()):
        out.write_text(text)
        assert isinstance(CliRunner().invoke(app, serve).exception, Refusal)
