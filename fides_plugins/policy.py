"""How detections combine, what each mode does, what an error becomes.

Nothing here trusts by default: a row is `trusted` only if the service's row is a distribution, a
reference exists for it, at least one detector judged it, none within the budget called it attacked,
and no plug-in failed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fides_plugins.guard import Failure
from fides_plugins.settings import Combine, Settings
from fides_plugins.types import (
    BoolArray,
    Detection,
    Float32Array,
    IntArray,
    Prediction,
    Reclassification,
    Status,
    Verdict,
    Verification,
)

COMBINED = "combined"


def combine_detections(
    detections: Sequence[Detection], n_rows: int, rule: Combine, false_alarm_rate: float
) -> tuple[Detection, BoolArray]:
    """One detection from several, whatever their order, and which of them raised its alarms, (D, N) bool.

    The combined score is the highest. The combined p-value is m times the smallest of m (Bonferroni),
    which is valid under any dependence between the detectors.

    Rules: `bonferroni` calls a row attacked if the combined p-value is within the budget, or if a
    detector without p-values says so; `any`, `all`, `majority` count each detector's own decision
    (its p-value against the whole budget where it has one).

    A detector raised an alarm if what the rule counts of it says so: under `bonferroni` m times its own
    p-value is within the budget, elsewhere its p-value is, and without p-values its decision is. The
    combined p-value is that of its lowest detector, so every attacked row has one that raised the alarm.
    """
    if not detections:
        nothing = np.zeros(n_rows, dtype=np.bool_)
        return Detection(np.zeros(n_rows), nothing, COMBINED, valid=nothing), np.zeros((0, n_rows), dtype=np.bool_)
    valid = np.stack([d.valid for d in detections])
    score = np.stack([np.where(d.valid, d.score, -1.0) for d in detections]).max(axis=0)
    p = np.stack([np.where(d.valid, d.p_value, np.nan) for d in detections]).astype(np.float64)
    calibrated = np.isfinite(p)
    count = calibrated.sum(axis=0)
    smallest = np.where(calibrated, p, np.inf).min(axis=0)
    combined = np.where(count > 0, np.minimum(1.0, smallest * np.maximum(count, 1)), np.nan)
    own = np.stack([d.attacked for d in detections]) & valid
    raised = np.where(calibrated, p * (count if rule == "bonferroni" else 1) <= false_alarm_rate, own)
    some = valid.any(axis=0)
    if rule == "all":
        attacked = (raised | ~valid).all(axis=0) & some
    elif rule == "majority":
        attacked = 2 * raised.sum(axis=0) > valid.sum(axis=0)
    else:
        attacked = raised.any(axis=0)
    return Detection(np.where(some, score, 0.0), attacked, COMBINED, p_value=combined, valid=some), raised


@dataclass(frozen=True)
class Decision:
    """Status and reason of every row, before any correction."""

    status: IntArray
    detection: Detection
    reason_codes: IntArray
    reasons: tuple[str, ...]

    @property
    def attacked(self) -> BoolArray:
        """(N,) bool."""
        return np.asarray(self.status == Status.ATTACKED)


class _Reasons:
    """Builds status and reason columns without a loop over rows; later rules win."""

    def __init__(self, n_rows: int) -> None:
        self.status = np.full(n_rows, Status.TRUSTED, dtype=np.int64)
        self.codes = np.zeros(n_rows, dtype=np.int64)
        self.texts = [""]

    def mark(self, rows: BoolArray, status: Status, text: str) -> None:
        self.mark_by(rows, status, np.zeros((0, len(rows)), dtype=np.bool_), lambda _: text)

    def mark_by(self, rows: BoolArray, status: Status, parts: BoolArray, text: Callable[[BoolArray], str]) -> None:
        """Mark rows whose text depends on their column of `parts` (P, N): one text for each distinct column."""
        if not rows.any():
            return
        chosen = parts[:, rows]
        pattern = np.zeros(chosen.shape[1], dtype=np.int64)
        for byte in np.packbits(chosen, axis=0):
            pattern = np.unique(256 * pattern + byte, return_inverse=True)[1]
        _, example, pattern = np.unique(pattern, return_index=True, return_inverse=True)
        self.status[rows] = status
        self.codes[rows] = len(self.texts) + pattern
        self.texts += [text(chosen[:, row]) for row in example]


def decide(
    settings: Settings,
    service: Prediction,
    verification: Verification | None,
    detections: Sequence[Detection],
    failures: Sequence[Failure],
) -> Decision:
    """Status of every row.

    An attack that a working detector found outranks a failure elsewhere; a failure outranks trust in the
    rows that failed; a service row that is not a distribution is an error whatever the detectors say. The reason of
    an attacked row names the detectors that raised its alarm, and no other.
    """
    n = service.n_rows
    every = np.ones(n, dtype=np.bool_)
    combined, raised = combine_detections(detections, n, settings.combine, settings.false_alarm_rate)
    failed = np.array([every if f.rows is None else f.rows for f in failures], np.bool_).reshape(len(failures), n)
    rows = _Reasons(n)
    rows.mark(~combined.valid, Status.INDETERMINATE, "no detector judged this row")
    if verification is None:
        rows.mark(every, Status.INDETERMINATE, "no verification answered")
    else:
        rows.mark(~verification.valid, Status.INDETERMINATE, "no reference for this row")

    def failure(which: BoolArray) -> str:
        return "; ".join(f.text for f, here in zip(failures, which, strict=True) if here)

    def alarm(which: BoolArray) -> str:
        m = len(detections)
        names = ", ".join(sorted({d.source for d, here in zip(detections, which[:m], strict=True) if here}))
        text = f"suspicious at a false-alarm rate of {settings.false_alarm_rate:g} ({names})"
        return "; ".join(t for t in (text, failure(which[m:])) if t)

    rows.mark_by(failed.any(axis=0), Status.ERROR, failed, failure)
    rows.mark_by(combined.attacked, Status.ATTACKED, np.concatenate([raised, failed]), alarm)
    rows.mark(~service.valid, Status.ERROR, "the service's output is not a finite class distribution")
    return Decision(rows.status, combined, rows.codes, tuple(rows.texts))


def refused_rows(settings: Settings, status: IntArray, corrected: BoolArray) -> BoolArray:
    """Rows whose answer must not be handed out: attacked in `reject`, unjudged in `closed`.

    `observe` changes nothing visible, so it refuses nothing. In `correct`, an attacked row without a
    correction has no answer to give and follows `on_error`.
    """
    if settings.mode == "observe":
        return np.zeros(status.shape, dtype=np.bool_)
    attacked = status == Status.ATTACKED
    unjudged = (status == Status.INDETERMINATE) | (status == Status.ERROR)
    if settings.mode == "correct":
        unjudged = unjudged | (attacked & ~corrected)
    closed = unjudged if settings.on_error == "closed" else np.zeros_like(unjudged)
    return np.asarray(closed | attacked) if settings.mode == "reject" else np.asarray(closed)


def make_verdict(
    settings: Settings,
    service: Prediction,
    verification: Verification | None,
    decision: Decision,
    correction: Reclassification | None,
) -> Verdict:
    """Put the parts together. `correction` covers the attacked rows only, in their order."""
    attacked = decision.attacked
    probabilities: Float32Array = np.where(service.valid[:, None], service.probabilities, np.float32(0))
    corrected = np.zeros(service.n_rows, dtype=np.bool_)
    if attacked.any():
        probabilities = probabilities.copy()
        probabilities[attacked] = 0
        if correction is not None:
            corrected[attacked] = correction.valid
            probabilities[corrected] = correction.probabilities[correction.valid]
    usable = probabilities.any(axis=1)
    unknown = np.full(service.n_rows, -1, dtype=np.int64)
    return Verdict(
        status=decision.status.astype(np.uint8),
        score=decision.detection.score,
        p_value=decision.detection.p_value,
        service_label=service.label,
        verified_label=unknown if verification is None else verification.label,
        label=np.where(usable, probabilities.argmax(axis=1), -1),
        probabilities=probabilities,
        corrected=corrected,
        refused=refused_rows(settings, decision.status, corrected),
        reason_codes=decision.reason_codes,
        reasons=decision.reasons,
    )


def failed_verdict(settings: Settings, n_rows: int, n_classes: int, reason: str) -> Verdict:
    """A verdict of `error` for every row, when there is nothing to judge: no service output, no bundle."""
    service = Prediction(
        np.full((n_rows, max(n_classes, 2)), 1.0 / max(n_classes, 2)), np.zeros(n_rows, dtype=np.bool_)
    )
    decision = decide(settings, service, None, [], [])
    texts = tuple(reason for _ in decision.reasons)
    return make_verdict(settings, service, None, replace(decision, reasons=texts), None)


def refused_verdict(n_rows: int, n_classes: int, reason: str) -> Verdict:
    """`attacked` and refused for every row, with nothing to use: the answer is known to be a lie."""
    every = np.ones(n_rows, dtype=np.bool_)
    return replace(
        failed_verdict(Settings(), n_rows, n_classes, reason),
        status=np.full(n_rows, Status.ATTACKED, dtype=np.uint8),
        score=every.astype(np.float32),
        refused=every,
    )


def without_corrections(settings: Settings, verdict: Verdict, why: str) -> Verdict:
    """The verdict on rows whose corrections cannot be handed out: attacked, with nothing to use, for `why`."""
    lost = verdict.corrected
    codes = np.where(lost, verdict.reason_codes + len(verdict.reasons), verdict.reason_codes)
    none = np.zeros_like(lost)
    return replace(
        verdict,
        label=np.where(lost, -1, verdict.label),
        probabilities=np.where(lost[:, None], np.float32(0), verdict.probabilities),
        corrected=none,
        refused=verdict.refused | (lost & refused_rows(settings, verdict.status.astype(np.int64), none)),
        reason_codes=codes,
        reasons=(*verdict.reasons, *(f"{reason}; {why}" for reason in verdict.reasons)),
    )


def exempt_verdict(settings: Settings, n_rows: int, n_classes: int, reason: str) -> Verdict:
    """`indeterminate` for rows that are no class output to verify (explanations, streams).

    Unlike an error they pass whatever `on_error` says: nothing failed, and the client is told.
    """
    verdict = failed_verdict(settings, n_rows, n_classes, reason)
    status = np.full(n_rows, Status.INDETERMINATE, dtype=verdict.status.dtype)
    return replace(verdict, status=status, refused=np.zeros(n_rows, dtype=np.bool_))
