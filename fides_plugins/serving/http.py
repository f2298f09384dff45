"""The HTTP part of a host: verdicts of requests from verdicts of rows, their headers, refusals and envelopes.

Nothing here depends on a server; every host that speaks HTTP can use it.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, fields, replace
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
HEADER_JUDGED = "x-fides-judged"
#: A longer value is cut: a header is for machines, records hold the whole reason.
MAX_HEADER_LENGTH = 256

NOT_ONE_TO_ONE = "rows and requests are not one to one, and the rule `rows` is not set for it"
AMBIGUOUS = "the calls of inference() may be passes over all requests or parts of the batch; set `calls`"
NO_PASSES = "the calls of inference() are not passes over all requests, although `calls` says so"
NO_ROW = "the request has no row"

#: Sums of rows that are followed while a batch is divided; no honest batch comes near.
_MAX_SUMS = 10_000

HTTP_ATTACKED = 409
HTTP_UNAVAILABLE = 503

#: How bad a status is, for a request with several rows under the rule `worst`.
_SEVERITY = {Status.ATTACKED: 3, Status.ERROR: 2, Status.INDETERMINATE: 1, Status.TRUSTED: 0}
#: Under the rule `any` only an attack counts against a request; then what was judged speaks for it.
_ANY_ORDER = {Status.ATTACKED: 3, Status.TRUSTED: 2, Status.ERROR: 1, Status.INDETERMINATE: 0}


@dataclass(frozen=True)
class RowVerdict:
    """One row of a `Verdict`, or the row that stands for a request.

    Attributes
    ----------
    labels:
        The labels of a request's own rows, where it is known which those are.
    judged:
        How much of the way to the client was judged: "inference" (what the model gave) or "answer" (and the class
        that the final body names); empty where nothing was.
    """

    status: Status
    score: float = math.nan
    p_value: float = math.nan
    label: int = -1
    service_label: int = -1
    verified_label: int = -1
    corrected: bool = False
    refused: bool = False
    reason: str = ""
    labels: tuple[int, ...] = field(default=(), compare=False)
    judged: str = ""

    @property
    def http_status(self) -> int:
        """Status code of a refusal."""
        return HTTP_ATTACKED if self.status is Status.ATTACKED else HTTP_UNAVAILABLE


#: The fields of a `RowVerdict` that are columns of a `Verdict`, in order.
_COLUMNS = tuple(f.name for f in fields(RowVerdict) if f.name not in ("labels", "judged"))


def rows_of(verdict: Verdict) -> list[RowVerdict]:
    """The rows of a verdict as objects; a server answers requests one by one."""
    columns = zip(*(getattr(verdict, name).tolist() for name in _COLUMNS), strict=True)
    return [RowVerdict(Status(status), *rest) for status, *rest in columns]


def request_verdict(verdict: Verdict) -> RowVerdict:
    """The verdict of a request with rows of its own: that of its worst row; `indeterminate` where it has none."""
    if not verdict.n_rows:
        return RowVerdict(Status.INDETERMINATE, reason=NO_ROW)
    return _combined(rows_of(verdict), "worst")


def per_request(
    calls: Sequence[Sequence[RowVerdict]],
    n_requests: int,
    rule: RowsRule,
    rows_per_request: int | None,
    unjudged: Callable[[str], RowVerdict],
    layout: CallsRule | None = None,
    counts: Sequence[Collection[int]] | None = None,
) -> list[RowVerdict]:
    """One verdict per request.

    Rows and requests that are one to one, in order, need no rule. Otherwise nothing is guessed: a request has its own
    block of rows where `rows_per_request` is declared, or where the requests can be read in only one way that makes
    as many rows; else every request of the batch answers for all rows of the batch; and under `refuse` no request is
    judged. Where the rows of a request cannot be told and one of the batch was attacked, every request counts as
    attacked: one client's odd request must not open the door for lies to all others.

    Parameters
    ----------
    calls:
        Verdicts of each `inference()`, in the order in which it got the rows.
    unjudged:
        Makes the verdict of a request that cannot be judged, from the reason.
    layout:
        What several calls are, where it is known; otherwise their sizes have to tell.
    counts:
        The numbers of rows that each request may have made; unset: as many as are declared, or one.
    """
    calls = [call for call in calls if call]
    rows = [row for call in calls for row in call]
    declared = rows_per_request or 1

    def undecided(why: str) -> list[RowVerdict]:
        verdict = unjudged(why)
        if any(row.status is Status.ATTACKED for row in rows):
            worst = _combined([*rows, verdict], "worst")
            verdict = verdict if worst == verdict else replace(worst, reason=f"{why}; {worst.reason}")
        return [verdict] * n_requests

    split = only_split([{declared}] * n_requests if counts is None else counts, len(rows))
    if rows and split is not None:
        having = [i for i, n in enumerate(split) if n]
        counted = any(split[i] != declared for i in having)
        passes = _are_passes([len(call) for call in calls], len(having), declared, layout, counted)
        if passes is None:
            return undecided(NO_PASSES if layout else AMBIGUOUS)
        blocks: list[Sequence[RowVerdict]] = [()] * n_requests
        start = 0
        for position, index in enumerate(having):
            if passes:
                blocks[index] = [r for call in calls for r in _share(call, position, len(having))]
            else:
                blocks[index] = rows[start : start + split[index]]
                start += split[index]
    elif rule == "refuse" or not rows or rows_per_request is not None:
        return undecided(NOT_ONE_TO_ONE)
    else:
        blocks = [rows] * n_requests
    own = split is not None
    return [_combined(block, rule, own) if block else unjudged(NO_ROW) for block in blocks]


def only_split(counts: Sequence[Collection[int]], total: int) -> list[int] | None:
    """The one way to take a number from each of `counts` so that they sum to `total`; None where there is none, or
    more than one.
    """
    # Sum so far to at most two ways to reach it: two are as good as many.
    ways: dict[int, list[tuple[int, ...]]] = {0: [()]}
    for numbers in counts:
        longer: dict[int, list[tuple[int, ...]]] = {}
        for reached, found in ways.items():
            for number in set(numbers):
                if reached + number <= total:
                    known = longer.setdefault(reached + number, [])
                    known += [(*way, number) for way in found[: 2 - len(known)]]
        if len(longer) > _MAX_SUMS:
            return None
        ways = longer
    found = ways.get(total, [])
    return list(found[0]) if len(found) == 1 else None


def _are_passes(
    sizes: Sequence[int], n_requests: int, declared: int, layout: CallsRule | None, counted: bool
) -> bool | None:
    """Whether every call had rows of all requests; None where its size fits that and another reading too.

    A pass has as many rows of each request, so its size is a multiple of the requests. A call on some of the
    requests, in order, has all rows of each, so its size is a multiple of the rows per request. Where no pass
    is possible the rows can only be in order, however they were cut into calls. Rows that were `counted`, not
    declared, fit every cut.
    """
    if len(sizes) == 1 or n_requests == 1 or layout == "parts":
        return False
    fits_passes = all(size % n_requests == 0 for size in sizes)
    if counted:
        return None if fits_passes or layout == "passes" else False
    if layout == "passes":
        return True if fits_passes else None
    fits_parts = all(size % declared == 0 for size in sizes)
    return None if fits_passes and fits_parts else fits_passes


def _share(rows: Sequence[RowVerdict], index: int, n_requests: int) -> Sequence[RowVerdict]:
    each = len(rows) // n_requests
    return rows[index * each : (index + 1) * each]


def _combined(rows: Sequence[RowVerdict], rule: RowsRule, own: bool = False) -> RowVerdict:
    """The row that stands for all; `own`: they belong to one request, which keeps their labels."""

    def weight(row: RowVerdict) -> tuple[float, ...]:
        # Among equals the most suspicious row speaks; NaN scores come last.
        score = -1.0 if math.isnan(row.score) else row.score
        if rule == "any":
            return (_ANY_ORDER[row.status], row.refused, score)
        # A row that must not be handed out outranks an attacked one that was corrected.
        return (row.refused, _SEVERITY[row.status], score)

    return replace(max(rows, key=weight), labels=tuple(row.label for row in rows) if own else ())


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
    if verdict.judged:
        values[HEADER_JUDGED] = verdict.judged
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
        "judged": verdict.judged or None,
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
