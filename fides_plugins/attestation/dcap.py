"""Quotes of Intel SGX and TDX, verified offline by `dcap-qvl`.

Its strict policy is the start (its plain `verify` accepts platforms that are out of date), and each field
of `EvidencePolicy` that relaxes something becomes one call. Debug enclaves are refused by the library and
once more here.
"""

from __future__ import annotations

import hashlib
import json
from typing import get_args

from fides_plugins.attestation.evidence import ReportFacts
from fides_plugins.attestation.policy import EvidencePolicy, TcbStatus
from fides_plugins.attestation.refusal import Refusal

_HEADER_BYTES = 48
_SGX_BODY_BYTES = 384
_TDX_BODY_BYTES = 584
_V5_DESCRIPTOR_BYTES = 6  # body type (2), body size (4)
_SGX_DEBUG = 0x02
_TD_DEBUG = 0x01
#: Part of dcap-qvl's message to what can be done in the policy about it.
_REMEDIES = {
    "Dynamic platform is not allowed": "Or set `allow_dynamic_platform`.",
    "Cached keys are not allowed": "Or set `allow_cached_keys`.",
    "SMT (hyperthreading) is not allowed": "Or set `allow_smt`.",
    "TCB too old": "`out_of_date_grace_days` says for how long it is accepted.",
    "is rejected by policy": "It is among `rejected_advisories`.",
    "TCB eval data number": "`minimum_tcb_evaluation` asks for newer collateral.",
    **{f"TCB status {status} is": f"Or list {status} in `allowed_tcb_status`." for status in get_args(TcbStatus)},
}


def signed_part(quote: bytes) -> bytes:
    """Header and body of a quote: what the attestation key signed (Intel's quote format 3, 4 and 5).

    Raises
    ------
    Refusal
        `evidence-malformed`.
    """
    version = int.from_bytes(quote[:2], "little")
    is_tdx = int.from_bytes(quote[4:8], "little") == 0x81
    if version == 5:
        start = _HEADER_BYTES + _V5_DESCRIPTOR_BYTES
        length = start + int.from_bytes(quote[_HEADER_BYTES + 2 : start], "little")
    elif version in (3, 4):
        length = _HEADER_BYTES + (_TDX_BODY_BYTES if is_tdx else _SGX_BODY_BYTES)
    else:
        raise Refusal("evidence-malformed", f"Quotes of version {version} are not known.")
    if len(quote) < length:
        raise Refusal("evidence-malformed", "The quote is too short.")
    return quote[:length]


def verify_quote(
    quote: bytes, collateral: str, policy: EvidencePolicy, now: float, root: bytes | None = None
) -> ReportFacts:
    """Verify a quote and return what it says.

    Parameters
    ----------
    quote:
        The raw quote.
    collateral:
        Intel's collateral for the platform, JSON text.
    policy:
        Only its fields about the platform are used here.
    now:
        Seconds since 1970.
    root:
        DER of another root certificate than Intel's; for tests with their own PKI.

    Raises
    ------
    Refusal
        `evidence-malformed`, `evidence-collateral`, `evidence-quote` or `evidence-debug`.
    """
    import dcap_qvl

    body = signed_part(quote)
    try:
        parsed = dcap_qvl.Quote.parse(quote)
        report = parsed.report
    except ValueError as error:
        raise Refusal("evidence-malformed", f"The quote cannot be parsed: {error}.") from None
    try:
        given = dcap_qvl.QuoteCollateralV3.from_json(collateral)
    except ValueError:
        raise Refusal(
            "evidence-collateral", "Intel's collateral for this quote is missing or malformed.", "Give it as JSON."
        ) from None
    seconds = max(0, int(now))
    demands = dcap_qvl.QuotePolicy.strict(seconds)
    for status in policy.allowed_tcb_status:
        demands = demands.allow_status(status)
    demands = demands.reject_advisories(list(policy.rejected_advisories))
    grace = policy.out_of_date_grace_days * 86_400
    demands = demands.platform_grace_period(grace).qe_grace_period(grace)
    demands = demands.min_tcb_eval_data_number(policy.minimum_tcb_evaluation)
    demands = demands.allow_dynamic_platform(policy.allow_dynamic_platform)
    demands = demands.allow_cached_keys(policy.allow_cached_keys).allow_smt(policy.allow_smt)
    try:
        claims = dcap_qvl.QuoteVerifier(root).verify_with_policy(quote, given, seconds, demands)
        facts = json.loads(claims.to_json())
    except ValueError as error:
        why = str(error).removeprefix("Verification failed: ")
        code = "evidence-debug" if "Debug mode" in why else "evidence-quote"
        # Other messages are about the quote or its signatures; no policy accepts those.
        remedy = next((text for part, text in _REMEDIES.items() if part in why), "")
        raise Refusal(code, f"The quote does not verify: {why}.", remedy) from None

    if parsed.is_tdx():
        debug = report.td_attributes[0] & _TD_DEBUG
        measurements = {"mrtd": report.mr_td.hex()}
        for i in range(4):
            measurements[f"rtmr{i}"] = getattr(report, f"rt_mr{i}").hex()
        # Chosen by the host when it starts the guest; measured beside the registers, not in them.
        measurements |= {"mrconfigid": report.mr_config_id.hex(), "mrowner": report.mr_owner.hex()}
    else:
        start = len(body) - _SGX_BODY_BYTES
        debug = report.attributes[0] & _SGX_DEBUG
        measurements = {
            "mrenclave": report.mr_enclave.hex(),
            "mrsigner": report.mr_signer.hex(),
            "isv_prod_id": str(int.from_bytes(body[start + 256 : start + 258], "little")),
            "isv_svn": str(int.from_bytes(body[start + 258 : start + 260], "little")),
        }
    if debug:
        raise Refusal("evidence-debug", "The quote comes from a debug enclave, which the host can read.")
    return ReportFacts(
        tee="tdx" if parsed.is_tdx() else "sgx",
        evidence_id=hashlib.sha256(body).digest(),
        report_data=bytes(report.report_data),
        measurements=measurements,
        tcb=facts["tcb"]["status"],
        advisories=tuple(facts["tcb"]["advisory_ids"]),
    )
