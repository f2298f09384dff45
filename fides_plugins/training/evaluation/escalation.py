"""A second look: what is caught where the most doubtful answers are asked again, and what that costs.

Rows whose p-value is at most a share are answered once more by an exact copy of the service in a trusted place; the
service's clean answer is that copy's. Where the claim contradicts it the row is attacked and the copy's class is the
correction; where it does not, the row is trusted. Rows that are not asked again keep the verdict of the first look.

Keys, by share of benign rows that shall be asked again:

- `cost`: what a benign row costs on average as a share of asking the service: the share of benign rows that were asked
  again here, and the verification model's multiply-adds over the service's where the bundle knows both.
- `false_alarm_rate`, `detected`, `recovered_service`: as of the first look, see `evaluate`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fides_plugins.training.evaluation.measures import Estimate
from fides_plugins.types import BoolArray, Float32Array, Float64Array, IntArray

#: Shares of benign rows that are asked again.
SHARES = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3)
#: A claim contradicts the copy where some probability differs by more: far above what rounding does to an honest one.
TOLERANCE = 1e-4


def escalate_clean(p_values: Float64Array, answers: Float32Array, rate: float, verification: float | None) -> Any:
    """False alarms and cost by share.

    Parameters
    ----------
    p_values:
        (N,) of benign rows.
    answers:
        (N, K) the service's answers, which are the copy's too.
    rate:
        Budget of the first look.
    verification:
        The verification model's cost as a share of the service's; None where it is not known, and left out.
    """
    found = {}
    for share in SHARES:
        asked = p_values <= share
        again = Estimate.share(asked)
        first = verification or 0.0
        cost = Estimate(first + again.value, first + again.low, first + again.high)
        alarms = Estimate.share(_attacked(asked, p_values, answers, answers, rate))
        found[f"{share:g}"] = {**alarms.to_json("false_alarm_rate"), **cost.to_json("cost")}
    return found


def escalate_attack(
    p_values: Float64Array, claimed: Float32Array, copy: Float32Array, corrected: IntArray, rate: float
) -> Any:
    """What is caught and recovered by share.

    Parameters
    ----------
    p_values:
        (m,) of attacked rows.
    claimed, copy:
        (m, K) the lie, and the un-attacked service's answer.
    corrected:
        (m,) the re-classifier's class.
    rate:
        Budget of the first look.
    """
    own = copy.argmax(axis=1)
    found = {}
    for share in SHARES:
        asked = p_values <= share
        answer = np.where(asked, own, corrected)
        found[f"{share:g}"] = {
            **Estimate.share(_attacked(asked, p_values, claimed, copy, rate)).to_json("detected"),
            **Estimate.share(answer == own).to_json("recovered_service"),
        }
    return found


def _attacked(
    asked: BoolArray, p_values: Float64Array, claimed: Float32Array, copy: Float32Array, rate: float
) -> BoolArray:
    """(N,) rows called attacked: by contradiction where the copy was asked, else by the first look."""
    contradicts = np.abs(claimed - copy).max(axis=1) > TOLERANCE
    return np.where(asked, contradicts, p_values <= rate)
