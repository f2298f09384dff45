"""From a document to a key that may sign receipts: the one place where evidence becomes trust."""

from __future__ import annotations

import hmac
import json
import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from fides_plugins.attestation import dcap, development, snp
from fides_plugins.attestation.clients import check_clients
from fides_plugins.attestation.evidence import CHALLENGE_BYTES, Evidence, ReportFacts, Statement, Tee
from fides_plugins.attestation.policy import EvidencePolicy
from fides_plugins.attestation.refusal import Refusal

#: Evidence may be this much ahead of the reader's clock before it is refused.
CLOCK_SKEW_S = 300.0
#: What says which program runs; the host's own values beside them may be zero.
_PROGRAM_REGISTERS = ("mrenclave", "mrtd", "rtmr0", "rtmr1", "rtmr2", "rtmr3", "measurement")


class InsecureEvidenceWarning(UserWarning):
    """Development evidence was accepted because the caller asked for it."""


@dataclass(frozen=True)
class TrustRoots:
    """Where trust starts. The defaults are the vendors' production roots.

    Attributes
    ----------
    intel:
        DER of the SGX root certificate; None: Intel's, as built into `dcap-qvl`.
    amd:
        Generation to SHA-256 of the ARK certificate.
    """

    intel: bytes | None = None
    amd: Mapping[str, str] = field(default_factory=lambda: snp.AMD_ROOTS)


@dataclass(frozen=True)
class TrustedEvidence:
    """Evidence that a policy accepted.

    Attributes
    ----------
    facts:
        What the hardware said.
    statement:
        What the report data bound; None for a bare report that the policy accepts.
    dated_at:
        Seconds since 1970 from which its age counts: the check's, where a challenge proved it fresh; else
        what it says itself.
    valid_until:
        Seconds since 1970 after which its set of clients holds no longer.
    """

    facts: ReportFacts
    statement: Statement | None
    dated_at: float
    valid_until: float = math.inf

    @property
    def development(self) -> bool:
        """Whether nothing but an explicit flag vouches for this evidence."""
        return self.facts.tee == "development"

    @property
    def signing_key(self) -> Ed25519PublicKey:
        """The key whose receipts may be believed.

        Raises
        ------
        Refusal
            `evidence-statement`, where the evidence vouches for no key.
        """
        if self.statement is None:
            raise Refusal("evidence-statement", "This evidence vouches for no key.")
        return Ed25519PublicKey.from_public_bytes(self.statement.signing_key)

    def summary(self) -> dict[str, Any]:
        """For people and `--json`."""
        result: dict[str, Any] = {
            "tee": self.facts.tee,
            "evidence_id": self.facts.evidence_id.hex(),
            "measurements": self.facts.measurements,
            "tcb": self.facts.tcb,
            "advisories": list(self.facts.advisories),
            "report_data": self.facts.report_data.hex(),
        }
        if self.statement is not None:
            result |= {
                "key_id": self.statement.key_id.hex(),
                "bundle_digest": self.statement.bundle_digest.hex(),
                "boot_id": self.statement.boot_id.hex(),
                "issued_at": self.statement.issued_at,
                "configuration": self.statement.settings,
            }
        return result


def new_challenge() -> bytes:
    """32 random bytes to be bound into fresh evidence."""
    return os.urandom(CHALLENGE_BYTES)


def sniff(data: bytes) -> Evidence:
    """A document, or a bare report or quote, as evidence.

    Raises
    ------
    Refusal
        `evidence-malformed`.
    """
    if data.lstrip()[:1] == b"{":
        return Evidence.from_json(data)
    tee: Tee
    if len(data) == snp.REPORT_BYTES and int.from_bytes(data[0x34:0x38], "little") == 1:
        tee = "sev-snp"
    else:
        dcap.signed_part(data)
        tee = "tdx" if int.from_bytes(data[4:8], "little") == 0x81 else "sgx"
    return Evidence(tee=tee, report=data)


def _report_facts(
    evidence: Evidence, policy: EvidencePolicy, now: float, roots: TrustRoots, insecure_development: bool
) -> ReportFacts:
    if evidence.tee == "development":
        if not insecure_development:
            raise Refusal(
                "evidence-development",
                "This is development evidence: no hardware stands behind it.",
                "Only tests may accept it, with an explicit insecure flag.",
            )
        warnings.warn(
            "Development evidence is accepted: nothing is protected from the host.", InsecureEvidenceWarning, 3
        )
        return development.verify_report(evidence.report)
    if not policy.measurements:
        raise Refusal("policy-empty", "The policy names no measurement, so it trusts nothing.", "Add one.")
    if evidence.tee == "sev-snp":
        return snp.verify_report(evidence.report, evidence.vcek, evidence.chain, policy, now, roots.amd)
    facts = dcap.verify_quote(evidence.report, evidence.collateral, policy, now, roots.intel)
    if facts.tee != evidence.tee:
        raise Refusal("evidence-malformed", f"The document says {evidence.tee}, its quote is of {facts.tee}.")
    return facts


def verify_evidence(
    evidence: Evidence,
    policy: EvidencePolicy,
    now: float,
    *,
    challenge: bytes = b"",
    roots: TrustRoots | None = None,
    insecure_development: bool = False,
) -> TrustedEvidence:
    """Decide whether a verifier is trusted.

    Parameters
    ----------
    evidence:
        The document, or a bare report.
    policy:
        What is demanded.
    now:
        Seconds since 1970, by the reader's clock.
    challenge:
        What the reader asked to be bound; checked where given.
    roots:
        Other roots than the vendors'; for tests.
    insecure_development:
        Accept development evidence, with a warning. Everything else of the policy still holds.

    Raises
    ------
    Refusal
        With the code of the first check that failed.
    """
    facts = _report_facts(evidence, policy, now, roots or TrustRoots(), insecure_development)
    if facts.tee != "development":
        _check_program(facts, policy)
    statement, valid_until = evidence.statement, math.inf
    if statement is None:
        _check_bare(facts, policy)
    else:
        valid_until = _check_statement(facts, statement, policy, now, challenge)
    # Without a challenge, how old the evidence was when it came here is part of its age.
    dated_at = float(statement.issued_at) if statement is not None and not challenge else now
    return TrustedEvidence(facts, statement, dated_at, valid_until)


def _check_program(facts: ReportFacts, policy: EvidencePolicy) -> None:
    measured = facts.measurements
    matching = [m for m in policy.measurements if m.matches(facts.tee, measured)]
    if not matching:
        raise Refusal(
            "evidence-measurement",
            f"The {facts.tee} measurements are of no program that the policy trusts.",
            f"Measured: {json.dumps(measured)}.",
        )
    zero = [name for name in _PROGRAM_REGISTERS if name in measured and not measured[name].strip("0")]
    if zero and not policy.allow_zero_registers:
        raise Refusal(
            "evidence-zero-register",
            f"Nothing was measured into {', '.join(zero)}, so what the image would extend it with is not vouched for.",
            "Measure it before its use, or set allow_zero_registers.",
        )
    if facts.tee == "tdx" and all(m.rtmr0 is None for m in matching) and not policy.allow_unpinned_rtmr0:
        raise Refusal(
            "evidence-rtmr0",
            "The policy's measurement leaves RTMR0 open: the host may configure the virtual machine as it likes.",
            f"Pin rtmr0 (measured: {measured['rtmr0']}), or set allow_unpinned_rtmr0.",
        )


def _check_bare(facts: ReportFacts, policy: EvidencePolicy) -> None:
    if policy.report_data is not None:
        if not hmac.compare_digest(bytes.fromhex(policy.report_data), facts.report_data):
            raise Refusal("evidence-report-data", "The report data is not what the policy expects.")
    elif not policy.allow_unbound_report_data:
        raise Refusal(
            "evidence-report-data",
            "A bare report vouches for no key.",
            "Give `report_data` in the policy, or set allow_unbound_report_data.",
        )


def _check_statement(
    facts: ReportFacts, statement: Statement, policy: EvidencePolicy, now: float, challenge: bytes
) -> float:
    """The time until which it holds, whatever its age."""
    if not hmac.compare_digest(statement.report_data(), facts.report_data):
        raise Refusal("evidence-report-data", "The report vouches for another key, bundle or configuration.")
    if challenge and not hmac.compare_digest(challenge, statement.challenge):
        raise Refusal("evidence-challenge", "The evidence was not made for this challenge: it may be old.")
    # A fresh challenge proves the age; without one the host's clock is all there is.
    age = 0.0 if challenge else now - statement.issued_at
    if age > policy.maximum_age_s:
        raise Refusal("evidence-age", f"The evidence is {age:.0f} s old; the policy allows {policy.maximum_age_s:.0f}.")
    if age < -CLOCK_SKEW_S:
        raise Refusal("evidence-age", "The evidence is from the future.")
    if not policy.models:
        raise Refusal("policy-empty", "The policy names no model, so it trusts no answer.", "Add one to `models`.")
    settings = statement.settings
    rule = policy.models.get(str(settings.get("model")))
    if rule is None:
        raise Refusal("evidence-model", "The verifier answers for a model that the policy does not name.")
    if statement.bundle_digest.hex() not in rule.bundle_digests:
        raise Refusal("evidence-bundle", "The verifier runs a bundle that the policy does not trust for its model.")
    version = settings.get("bundle_version")
    if not isinstance(version, int) or version < rule.minimum_bundle_version:
        raise Refusal("evidence-bundle-version", f"The verifier's bundle has version {version}: too old.")
    return check_clients(settings, policy, now)
