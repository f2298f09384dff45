"""How detections combine, what each mode does, what an error becomes.

Nothing here trusts by default: a row is `trusted` only if the service's row is a distribution, a
reference exists for it, at least one detector judged it, none within the budget called it attacked,
and no plug-in failed.
"""

from __future__ import annotations

from collections.abc import Sequence
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
) -> Detection:
    """One detection from several, whatever their order.

    The combined score is the highest. The combined p-value is m times the smallest of m (Bonferroni),
    which is valid under any dependence between the detectors.

    Rules: `bonferroni` calls a row attacked if the combined p-value is within the budget, or if a
    detector without p-values says so; `any`, `all`, `majority` count each detector's own decision
    (its p-value against the whole budget where it has one).
    """
    if not detections:
        nothing = np.zeros(n_rows, dtype=np.bool_)
        return Detection(np.zeros(n_rows), nothing, COMBINED, valid=nothing)
    valid = np.stack([d.valid for d in detections])
    score = np.stack([np.where(d.valid, d.score, -1.0) for d in detections]).max(axis=0)
    p = np.stack([np.where(d.valid, d.p_value, np.nan) for d in detections]).astype(np.float64)
    calibrated = np.isfinite(p)
    count = calibrated.sum(axis=0)
    smallest = np.where(calibrated, p, np.inf).min(axis=0)
    combined = np.where(count > 0, np.minimum(1.0, smallest * np.maximum(count, 1)), np.nan)
    own = np.stack([d.attacked for d in detections]) & valid
    decided = np.where(calibrated, p <= false_alarm_rate, own)
    some = valid.any(axis=0)
    if rule == "bonferroni":
        with np.errstate(invalid="ignore"):
            attacked = (combined <= false_alarm_rate) | (own & ~calibrated).any(axis=0)
    elif rule == "any":
        attacked = decided.any(axis=0)
    elif rule == "all":
        attacked = (decided | ~valid).all(axis=0) & some
    else:
        attacked = 2 * decided.sum(axis=0) > valid.sum(axis=0)
    return Detection(np.where(some, score, 0.0), attacked & some, COMBINED, p_value=combined, valid=some)


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
        self.status = np.where(rows, status, self.status)
        self.codes = np.where(rows, len(self.texts), self.codes)
        self.texts.append(text)


def decide(
    settings: Settings,
    service: Prediction,
    verification: Verification | None,
    detections: Sequence[Detection],
    failures: Sequence[Failure],
) -> Decision:
    """Status of every row.

    An attack that a working detector found outranks a failure elsewhere; a failure outranks trust; a
    service row that is no distribution is an error whatever anyone says.
    """
    n = service.n_rows
    combined = combine_detections(detections, n, settings.combine, settings.false_alarm_rate)
    rows = _Reasons(n)
    failed = "; ".join(f.text for f in failures)
    rows.mark(~combined.valid, Status.INDETERMINATE, "no detector judged this row")
    if verification is None:
        rows.mark(np.ones(n, dtype=np.bool_), Status.INDETERMINATE, "no verification answered")
    else:
        rows.mark(~verification.valid, Status.INDETERMINATE, "no reference for this row")
    if failures:
        rows.mark(np.ones(n, dtype=np.bool_), Status.ERROR, failed)
    attacked = combined.attacked & combined.valid
    names = ", ".join(sorted(d.source for d in detections))
    text = f"suspicious at a false-alarm rate of {settings.false_alarm_rate:g} ({names})"
    rows.mark(attacked, Status.ATTACKED, f"{text}; {failed}" if failed else text)
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
