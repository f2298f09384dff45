"""One real inference through every step of a protected model, and what its answer says about the set-up."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fides_plugins.codec import OutputCodec
from fides_plugins.errors import InputError
from fides_plugins.serving.finding import CheckFinding
from fides_plugins.serving.triton import wire
from fides_plugins.serving.triton.config import parse_json, queue_problem
from fides_plugins.serving.triton.operator.alarm import alarm_findings
from fides_plugins.serving.triton.operator.api import TritonApi
from fides_plugins.serving.triton.operator.probe import (
    InferenceProbe,
    Protected,
    as_probe,
    divisible,
    find_protected,
    probe,
    sample_batches,
    sample_references,
)
from fides_plugins.types import SUM_TOLERANCE

#: Free bytes of /dev/shm below which a step may fail to grow its shared memory.
SHM_NEEDED = 64 * 1024 * 1024
#: P-values from here on lower the evidence of the service alarm, whatever it has seen (k p^(k-1) < 1 for its bets).
HARMLESS_P_VALUE = 0.5
#: How long the metrics of a server that has just started may be without the alarm.
ALARM_PATIENCE_S = 2.0
_LOCAL = ("127.0.0.1", "localhost", "::1")

_NO_SHM = "/dev/shm is full: give the container more (docker run --shm-size=1g; an emptyDir of medium Memory)."
_EMPTY = "The python backend handed back an empty tensor: pin numpy below 2 in the server's environment."
#: What the server says when something goes wrong, and how to fix it.
REMEDIES = {
    "shared memory": _NO_SHM,
    "not healthy": "The step's process died. Reload it: fides watch triton URL, or restart the server.",
    "input byte size mismatch": _EMPTY,
    "bytes, not": _EMPTY,
    "no answer within": "The step hangs or is overloaded; see the server's log; raise --timeout if it is only slow.",
    "unexpected shape": "The generated input does not fit: give a real one with --data.",
}


def check(
    api: TritonApi, model: str, data: Mapping[str, NDArray[Any]] | None = None, timeout_s: float = 10.0
) -> list[CheckFinding]:
    """Check a protected model step by step; findings in the order in which to fix them, and the service alarm.

    The steps are asked directly, and the verdict is marked as a probe's. A request through the protected
    model itself is counted like any client's, because no mark from outside may keep it out of the records:
    one row is sent, and only if the marked verdict shows that it cannot raise the service alarm.

    Parameters
    ----------
    data:
        Real inputs by name; values are generated where it has none. Its first rows go to the steps in
        batches, until one of them is harmless: that one is sent through the protected model.

    Raises
    ------
    ServerError
        If the server cannot be reached or `model` is not served, or not protected.
    """
    (item,) = find_protected(api, model)
    return [*_check_steps(api, item, data, timeout_s), *alarm_findings(api, [item], ALARM_PATIENCE_S).values()]


def _check_steps(
    api: TritonApi, item: Protected, data: Mapping[str, NDArray[Any]] | None, timeout_s: float
) -> list[CheckFinding]:
    ready = api.ready()
    detail, remedy = ("", "") if ready else ("some model is not ready", "See its log.")
    findings = [CheckFinding("server ready", ready, detail, remedy), _state(item)]
    if api.host in _LOCAL:
        findings.append(_shared_memory())
    problem, remedy = queue_problem(parse_json(api.config(item.base)))
    if problem:
        # Not tried: the inference itself could end the server.
        return [*findings, CheckFinding("service model", False, f"{item.base!r} {problem}", remedy)]
    config = api.config(item.name)
    findings += _data(config, data)
    for inputs in sample_batches(config, data):
        base = probe(api, item.base, inputs, timeout_s)
        verified = probe(api, item.verify, inputs, timeout_s)
        judged, row, harmful = _judge(api, item, inputs, base, verified, timeout_s)
        if not harmful:
            break
    findings += [_finding("service model", base), *_coarse(api.config(item.validate), base)]
    findings += [_finding("verification", verified, _verification_detail(verified)), judged]
    bad = [f.what for f in findings if f.good is False]
    if bad:
        findings.append(CheckFinding("protected model", False, "Not tried.", f"Fix first: {', '.join(bad)}."))
    elif harmful:
        sent = "not sent" if data is None else "the most harmless row was not sent"
        detail = f"Its steps work; {sent} through as a whole, because {harmful}"
        findings.append(CheckFinding("protected model", True, detail, "Give benign rows with --data."))
    else:
        if divisible(config):
            inputs = {name: array[row : row + 1] for name, array in inputs.items()}
        whole = probe(api, item.name, inputs, timeout_s)
        findings.append(_finding("protected model", whole, _whole_detail(item, base, whole)))
    return findings


def _data(config: Mapping[str, Any], data: Mapping[str, NDArray[Any]] | None) -> list[CheckFinding]:
    """What of the given data is not used, and what is generated in spite of them."""
    if data is None:
        return []
    needed = {str(e["name"]): not e.get("optional") for e in config["input"]}
    parts = {
        "not used": sorted(set(data) - set(needed)),
        "generated": [name for name, required in needed.items() if required and name not in data],
    }
    detail = "; ".join(f"{what}: {', '.join(names)}" for what, names in parts.items() if names)
    if not detail:
        return []
    # Labels beside the inputs are usual; where nothing is used, the names are wrong.
    good = None if set(data) & set(needed) else False
    return [CheckFinding("data", good, detail, f"{config['name']} takes: {', '.join(needed)}.")]


def _state(item: Protected) -> CheckFinding:
    if item.degraded:
        detail = "The fallback stands in for verification."
        return CheckFinding("protection", False, detail, "`fides watch triton URL` restores it.")
    return CheckFinding("protection", True, f"{item.base} + {item.verify} -> {item.validate}")


def _shared_memory() -> CheckFinding:
    try:
        stats = os.statvfs("/dev/shm")
    except OSError:
        return CheckFinding("/dev/shm", None, "not there; not checked")
    free = stats.f_bavail * stats.f_frsize
    detail = f"{free // 2**20} MiB free, {SHM_NEEDED // 2**20} needed"
    good = free >= SHM_NEEDED
    return CheckFinding("/dev/shm", good, detail, "" if good else _NO_SHM)


def _finding(what: str, result: InferenceProbe, problem: str = "") -> CheckFinding:
    if not result.alive:
        problem = result.detail
    remedy = next((text for sign, text in REMEDIES.items() if problem and sign in problem), "")
    return CheckFinding(what, not problem, problem, remedy, result.seconds)


def _coarse(config: Mapping[str, Any], base: InferenceProbe) -> list[CheckFinding]:
    """What there is to say about answers of few digits or classes."""
    given = {key: str(value.get("string_value", "")) for key, value in config.get("parameters", {}).items()}
    output = (base.outputs or {}).get(given.get("fides.output", ""))
    try:
        codec = OutputCodec("logits" if given.get("fides.output_kind") == "logits" else "probabilities")
        form = "" if output is None else codec.coarse_form(output)
    except InputError:  # the verdict says what is wrong with such an output
        form = ""
    remedy = "See what `fides fit` reports for this form, and fit on answers that are written so."
    return [CheckFinding("answers", None, f"written coarsely: {form}", remedy)] if form else []


def _verification_detail(result: InferenceProbe) -> str:
    if result.outputs is None:
        return result.detail
    references, available = result.outputs[wire.REFERENCES], result.outputs[wire.AVAILABLE]
    if references.size == 0:
        return "The references are empty: input byte size mismatch."
    if not available.any():
        outcome = wire.unpack_outcome(references, available, result.outputs[wire.VERIFICATION])
        reasons = "; ".join(f.text for f in outcome.failures)
        return f"No verifier answered. {reasons}".strip()
    if not np.allclose(references.sum(axis=-1), 1.0, atol=SUM_TOLERANCE):
        return "A reference is not a distribution: the numbers were damaged on their way; pin numpy below 2."
    return ""


def _judge(
    api: TritonApi,
    item: Protected,
    inputs: Mapping[str, NDArray[Any]],
    base: InferenceProbe,
    verified: InferenceProbe,
    timeout_s: float,
) -> tuple[CheckFinding, int, str]:
    """The finding, the most harmless row, and why even that should not be sent where it is counted; empty if it may."""
    config = api.config(item.validate)
    taken = {str(e["name"]) for e in config["input"]} - set(wire.INTERNAL)
    if base.outputs is None:
        return CheckFinding("validation", False, "Not tried: the service model gave no answer."), 0, ""
    references = sample_references(config)
    if verified.outputs is not None and verified.outputs[wire.VERIFICATION].size:
        references = {name: verified.outputs[name] for name in wire.INTERNAL}
    given = {n: a for n, a in {**inputs, **base.outputs}.items() if n in taken}
    result = probe(api, item.validate, {**given, **as_probe(references)}, timeout_s)
    if result.outputs is None:
        return _finding("validation", result), 0, ""
    status = _texts(result.outputs[wire.STATUS])
    for found, reason in zip(status, _texts(result.outputs[wire.REASON]), strict=True):
        if found in ("error", "indeterminate"):
            return _finding("validation", result, f"The verdict is {found}: {reason}."), 0, ""
    # A generated input looks like nothing that the model knows, so `attacked` is a good sign of life, too.
    finding = CheckFinding("validation", True, _verdicts(status), seconds=result.seconds)
    p_values = np.nan_to_num(result.outputs[wire.P_VALUE].ravel(), nan=1.0)
    if not divisible(api.config(item.name)):
        return finding, 0, _harm(status, p_values)
    row = int(np.where(np.array(status) == "trusted", p_values, -1.0).argmax())
    return finding, row, _harm(status[row : row + 1], p_values[row : row + 1])


def _verdicts(status: Sequence[str]) -> str:
    """How many rows had which verdict."""
    counts = Counter(status)
    if len(counts) == 1:
        return f"verdict: {status[0]}"
    return "verdicts: " + ", ".join(f"{count} {name}" for name, count in counts.most_common())


def _harm(status: Sequence[str], p_values: NDArray[Any]) -> str:
    """Why rows with these verdicts would count against the service."""
    if set(status) != {"trusted"}:
        return "it would be counted as attacked."
    # A detector without a calibration has no p-values, and then there is no alarm either.
    lowest = float(np.min(p_values))
    return f"its p-value of {lowest:.2g} would be evidence for the service alarm." if lowest < HARMLESS_P_VALUE else ""


def _texts(array: NDArray[Any]) -> list[str]:
    return [v.decode(errors="replace") if isinstance(v, bytes) else str(v) for v in array.ravel()]


def _whole_detail(item: Protected, base: InferenceProbe, whole: InferenceProbe) -> str:
    if whole.outputs is None or base.outputs is None:
        return "" if whole.alive else whole.detail
    missing = sorted(set(base.outputs) - set(whole.outputs))
    return f"Outputs of the service model are missing: {', '.join(missing)}." if missing else ""
