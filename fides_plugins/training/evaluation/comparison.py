"""The learned detector beside the rules of thumb that it has to beat, at equal false-alarm rate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from fides_plugins.statistics import divergences
from fides_plugins.training.evaluation.measures import Estimate, Scores
from fides_plugins.training.predictions import Predictions
from fides_plugins.types import Float32Array, Float64Array

if TYPE_CHECKING:
    from fides_plugins.training.predictions import AttackedRows

#: The false-alarm rates at which detectors are measured and compared.
FPR_LEVELS = (0.01, 0.05)


def rule_scores(clean: Predictions, attack: AttackedRows, weights: Any) -> dict[str, Scores]:
    """The rules of thumb that a learned detector has to beat: plain disagreement, and KL with a threshold."""

    def disagree(s: Float32Array, v: Float32Array) -> Float64Array:
        return np.asarray(s.argmax(axis=1) != v.argmax(axis=1), np.float64)

    return {
        name: Scores(
            rule(clean.service, clean.verification), rule(attack.service, attack.verification), attack.rows, weights
        )
        for name, rule in (("disagreement", disagree), ("kl", divergences.kl))
    }


def compare(learned: Scores, disagreement: Scores, kl: Scores) -> dict[str, Any]:
    """Learned minus rule at equal false-alarm rate: disagreement at its own, KL at every level of `FPR_LEVELS`."""
    own_fpr, own_tpr = disagreement.above(0.5)
    m = len(learned.attacked)
    table = {"disagreement": _difference(learned.tpr_at(own_fpr), own_tpr, float(own_fpr[0]), m)}
    for level in FPR_LEVELS:
        table[f"kl_at_fpr_{level:g}"] = _difference(learned.tpr_at(level), kl.tpr_at(level), level, m)
    return table


def _difference(learned: Float64Array, rule: Float64Array, fpr: float, rows: int) -> dict[str, Any]:
    difference = Estimate.of(learned - rule, rows, bounds=(-1.0, 1.0))
    known = not np.isnan(difference.value)
    return {
        "false_alarm_rate": round(fpr, 6),
        "learned": round(float(learned[0]), 6) if known else None,
        "rule": round(float(rule[0]), 6) if known else None,
        **difference.to_json("difference"),
        "no_worse": difference.high >= 0.0 if known else None,
    }
