"""What coarse answers cost: the share of lies that is caught where a service answers with few digits or classes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from fides_plugins.codec import COARSE_DECIMALS
from fides_plugins.onnx_model import OnnxModel
from fides_plugins.statistics.conformal import Calibration
from fides_plugins.training.attacks import OutputAttack
from fides_plugins.training.predictions import PROBABILITIES, Predictions, run_graph
from fides_plugins.types import Float32Array

#: The answers as they are, beside which the coarse ones are told.
AS_ANSWERED = "as answered"
TOPS = (5, 3)


def rounded(probabilities: Float32Array, decimals: int) -> Float32Array:
    """(N, K) with so many decimals."""
    return np.asarray(np.round(probabilities.astype(np.float64), decimals), np.float32)


def top(probabilities: Float32Array, k: int) -> Float32Array:
    """(N, K) of which each row keeps its k highest classes; the others are 0, and nothing makes up for them."""
    least = -np.partition(-probabilities, k - 1, axis=1)[:, k - 1 : k]
    return np.where(probabilities >= least, probabilities, np.float32(0))


def ways_to_write(n_classes: int) -> dict[str, Callable[[Float32Array], Float32Array]]:
    """Ways to write K probabilities, by name: as they are, and coarser."""
    ways: dict[str, Callable[[Float32Array], Float32Array]] = {AS_ANSWERED: lambda probabilities: probabilities}
    ways |= {f"{d} decimals": partial(rounded, decimals=d) for d in COARSE_DECIMALS}
    return ways | {f"top {k}": partial(top, k=k) for k in TOPS if k < n_classes}


@dataclass(frozen=True)
class FormCost:
    """What one form would cost.

    Attributes
    ----------
    form:
        One of `ways_to_write`.
    caught:
        By attack, the share of its lies that the learned detector catches at the budget, of those that are still
        distributions; an attack is missing where none is.
    errors:
        Share of honest rows that are no distribution any more, which every host calls `error`.
    """

    form: str
    caught: dict[str, float]
    errors: float


def form_costs(
    detector: OnnxModel, rows: Predictions, attacks: Sequence[OutputAttack], false_alarm_rate: float, seed: int
) -> tuple[FormCost, ...]:
    """The cost of each form, by the detector as it is, calibrated again on honest rows written so.

    Parameters
    ----------
    rows:
        Clean pairs that nothing was trained on.
    attacks:
        Made on the clean answers, then written in the form; only rows that are still distributions count.
    false_alarm_rate:
        The budget.
    seed:
        Of the attacks.
    """
    made = [attack.apply(rows.service, attack.stream(seed)) for attack in attacks]
    costs = []
    for form, write in ways_to_write(rows.n_classes).items():
        honest = _scores(detector, write(rows.service), rows.verification)
        caught = {}
        for attack, (lies, changed) in zip(attacks, made, strict=True):
            found = _scores(detector, write(lies[changed]), rows.verification[changed])
            if len(honest) and len(found):
                alarms = Calibration(honest).p_value(found) <= false_alarm_rate
                caught[attack.name] = round(float(alarms.mean()), 4)
        costs.append(FormCost(form, caught, round(1.0 - len(honest) / rows.n_rows, 4)))
    return tuple(costs)


def _scores(detector: OnnxModel, written: Float32Array, verification: Float32Array) -> Float32Array:
    """Scores of the rows that are still distributions."""
    service = PROBABILITIES.read(written)
    good = service.valid
    return run_graph(detector, "score", service=service.probabilities[good], verification=verification[good])
