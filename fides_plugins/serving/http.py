"""The HTTP part of a host: verdicts of requests from verdicts of rows, their headers, refusals and envelopes.

Nothing here depends on a server; every host that speaks HTTP can use it.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from fides_plugins.types import Status, Verdict

#: How rows make the verdict of a request where rows and requests are not one to one.
RowsRule = Literal["any", "worst", "refuse"]
#: What several calls of a model are to a batch: parts of it in order, or passes over all of it.
CallsRule = Literal["parts", "passes"]

HEADER_STATUS = "x-fides-status"
HEADER_SCORE = "x-fides-score"
HEADER_LABEL = "x-fides-label"
HEADER_P_VALUE = "x-fides-p-value"
HEADER_REASON = "x-fides-reason"
#: A longer value is cut: a header is for machines, records hold the whole reason.
MAX_HEADER_LENGTH = 256

NOT_ONE_TO_ONE = "rows and requests are not one to one, and the rule `rows` is not set for it"
AMBIGUOUS = "the calls of inference() may be passes over all requests or parts of the batch; set `calls`"
NO_PASSES = "the calls of inference() are not passes over all requests, although `calls` says so"

HTTP_ATTACKED = 409
HTTP_UNAVAILABLE = 503

#: How bad a status is, for a request with several rows under the rule `worst`.
_SEVERITY = {Status.ATTACKED: 3, Status.ERROR: 2, Status.INDETERMINATE: 1, Status.TRUSTED: 0}
#: Under the rule `any` only an attack counts against a request; then what was judged speaks for it.
_ANY_ORDER = {Status.ATTACKED: 3, Status.TRUSTED: 2, Status.ERROR: 1, Status.INDETERMINATE: 0}


@dataclass(frozen=True)
class RowVerdict:
    """One row of a `Verdict`, or the row that stands for a request."""

    status: Status
    score: float = math.nan
    p_value: float = math.nan
    label: int = -1
    service_label: int = -1
    verified_label: int = -1
    corrected: bool = False
    refused: bool = False
    reason: str = ""

    @property
    def http_status(self) -> int:
        """Status code of a refusal."""
        return HTTP_ATTACKED if self.status is Status.ATTACKED else HTTP_UNAVAILABLE


def rows_of(verdict: Verdict) -> list[RowVerdict]:
    """The rows of a verdict as objects; a server answers requests one by one."""
    columns = zip(*(getattr(verdict, field.name).tolist() for field in fields(RowVerdict)), strict=True)
    return [RowVerdict(Status(status), *rest) for status, *rest in columns]


def request_verdict(verdict: Verdict) -> RowVerdict:
    """The verdict of a request with rows of its own: that of its worst row; `indeterminate` where it has none."""
    if not verdict.n_rows:
        return RowVerdict(Status.INDETERMINATE, reason="the request has no row")
    return _combined(rows_of(verdict), "worst")


def per_request(
    calls: Sequence[Sequence[RowVerdict]],
    n_requests: int,
    rule: RowsRule,
    rows_per_request: int | None,
    unjudged: Callable[[str], RowVerdict],
    layout: CallsRule | None = None,
) -> list[RowVerdict]:
    """One verdict per request.

    Rows and requests that are one to one, in order, need no rule. Otherwise nothing is guessed: with
    `rows_per_request` declared each request has its own block of rows; without it every request of the
    batch answers for all rows of the batch; and under `refuse` no request is judged. Where the rows of a
    request cannot be told and one of the batch was attacked, every request counts as attacked: one client's
    odd request must not open the door for lies to all others.

    Parameters
    ----------
    calls:
        Verdicts of each `inference()`, in the order in which it got the rows.
    unjudged:
        Makes the verdict of a request that cannot be judged, from the reason.
    layout:
        What several calls are, where it is known; otherwise their sizes have to tell.
    """
    calls = [call for call in calls if call]
    rows = [row for call in calls for row in call]
    declared = rows_per_request or 1

    def undecided(why: str) -> list[RowVerdict]:
        verdict = unjudged(why)
        if any(row.status is Status.ATTACKED for row in rows):
            worst = _combined([*rows, verdict], "worst")
            verdict = worst if worst is verdict else replace(worst, reason=f"{why}; {worst.reason}")
        return [verdict] * n_requests

    if n_requests and len(rows) == n_requests * declared and (declared == 1 or rule != "refuse"):
        passes = _are_passes([len(call) for call in calls], n_requests, declared, layout)
        if passes is None:
            return undecided(NO_PASSES if layout else AMBIGUOUS)
        parts = [(call, len(call) // n_requests) for call in (calls if passes else [rows])]
        blocks = [[r for part, n in parts for r in part[i * n : (i + 1) * n]] for i in range(n_requests)]
    elif rule == "refuse" or not rows or rows_per_request is not None:
        return undecided(NOT_ONE_TO_ONE)
    else:
        blocks = [rows] * n_requests
    return [block[0] if len(block) == 1 else _combined(block, rule) for block in blocks]


def _are_passes(sizes: Sequence[int], n_requests: int, declared: int, layout: CallsRule | None) -> bool | None:
    """Whether every call had rows of all requests; None where its size fits that and another reading too.

    A pass has as many rows of each request, so its size is a multiple of the requests. A call on some of the
    requests, in order, has all rows of each, so its size is a multiple of the rows per request. Where no pass
    is possible the rows can only be in order, however they were cut into calls.
    """
    if len(sizes) == 1 or n_requests == 1 or layout == "parts":
        return False
    fits_passes = all(size % n_requests == 0 for size in sizes)
    if layout == "passes":
        return True if fits_passes else None
    fits_parts = all(size % declared == 0 for size in sizes)
    return None if fits_passes and fits_parts else fits_passes


def _combined(rows: Sequence[RowVerdict], rule: RowsRule) -> RowVerdict:
    def weight(row: RowVerdict) -> tuple[float, ...]:
        # Among equals the most suspicious row speaks; NaN scores come last.
        score = -1.0 if math.isnan(row.score) else row.score
        if rule == "any":
            return (_ANY_ORDER[row.status], row.refused, score)
        # A row that must not be handed out outranks an attacked one that was corrected.
        return (row.refused, _SEVERITY[row.status], score)

    return max(rows, key=weight)


def printable(value: object, limit: int = MAX_HEADER_LENGTH) -> str:
    """Text as printable ASCII, at most `limit` long: a newline in a header ends a response early."""
    text = "".join(c if " " <= c <= "~" else " " if c.isspace() else "?" for c in str(value)[: 4 * limit])
    return " ".join(text.split())[:limit]


def headers(verdict: RowVerdict) -> dict[str, str]:
    """Response headers of one request; an unknown value has no header, and a refusal tells no label."""
    values = {HEADER_STATUS: verdict.status.text}
    if not math.isnan(verdict.score):
        values[HEADER_SCORE] = f"{verdict.score:.6f}"
    if verdict.label >= 0 and not verdict.refused:
        values[HEADER_LABEL] = str(verdict.label)
    if not math.isnan(verdict.p_value):
        values[HEADER_P_VALUE] = f"{verdict.p_value:.6g}"
    if verdict.reason:
        values[HEADER_REASON] = verdict.reason
    return {name: printable(value) for name, value in values.items()}


def as_json(verdict: RowVerdict, class_names: Sequence[str] = ()) -> dict[str, Any]:
    """The verdict as a JSON object; numbers that are unknown are null."""
    known = 0 <= verdict.label < len(class_names)
    return {
        "status": verdict.status.text,
        "score": _number(verdict.score),
        "p_value": _number(verdict.p_value),
        "label": verdict.label if verdict.label >= 0 else None,
        "class_name": class_names[verdict.label] if known else None,
        "corrected": verdict.corrected,
        "refused": verdict.refused,
        "reason": printable(verdict.reason),
    }


def refusal(verdict: RowVerdict) -> dict[str, Any]:
    """JSON body of a refused request: `code`, `type`, `message`, and a verdict that tells nothing of a correction."""
    kind, why = "FidesVerificationUnavailable", "could not be verified"
    if verdict.status is Status.ATTACKED:
        kind, why = "FidesAttackDetected", "was tampered with"
    told = {k: v for k, v in as_json(verdict).items() if k not in ("label", "class_name", "corrected")}
    return {"code": verdict.http_status, "type": kind, "message": f"The answer {why} and is withheld.", "fides": told}


def envelope(response: Any, verdict: RowVerdict, class_names: Sequence[str]) -> dict[str, Any]:
    """The original response and the verdict in one JSON object.

    `response_encoding` says how to get the original back: "json" (embedded as it is), "text", "base64"
    (bytes), or "tensor" (nested lists of a tensor's values).
    """
    encoding, value = "json", response
    if isinstance(response, (bytes, bytearray)):
        encoding, value = "base64", base64.b64encode(response).decode("ascii")
    elif isinstance(response, str):
        encoding = "text"
    elif hasattr(response, "detach"):
        encoding, value = "tensor", response.detach().cpu().tolist()
    return {"fides": as_json(verdict, class_names), "response_encoding": encoding, "response": value}


def _number(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 6)
