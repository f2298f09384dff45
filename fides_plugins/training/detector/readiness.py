"""Measures how ready freshly trained detection is, on the rows that calibrated it."""

from __future__ import annotations

import numpy as np

from fides_plugins.onnx_model import OnnxModel
from fides_plugins.readiness import Readiness
from fides_plugins.statistics.conformal import Calibration
from fides_plugins.training.attacks import OutputAttack, default_registry
from fides_plugins.training.predictions import Predictions, run_graph
from fides_plugins.types import Float32Array, IntArray


def telling_attacks() -> list[OutputAttack]:
    """Two of the built-in ones, whatever a fit was given: the hardest lie to see, and the plainest."""
    return [default_registry().output(name) for name in ("switch", "random")]


def measure_readiness(
    detector: OnnxModel, reclassifier: OnnxModel, rows: Predictions, rate: float, seed: int
) -> Readiness:
    """What to expect of detection at a false-alarm rate.

    Parameters
    ----------
    rows:
        The calibration rows: clean pairs that nothing was trained on.
    """
    own = rows.service.argmax(axis=1)
    scores = run_graph(detector, "score", service=rows.service, verification=rows.verification)
    calibration = Calibration(scores)

    def corrected(service: Float32Array, verification: Float32Array) -> IntArray:
        graph = run_graph(reclassifier, "probabilities", service=service, verification=verification)
        return np.asarray(graph.argmax(axis=1))

    caught, recovered = {}, {}
    for attack in telling_attacks():
        lies, changed = attack.apply(rows.service, attack.stream(seed))
        lies, verification = lies[changed], rows.verification[changed]
        if not len(lies):
            continue
        seen = calibration.p_value(run_graph(detector, "score", service=lies, verification=verification)) <= rate
        caught[attack.name] = round(float(seen.mean()), 4)
        if seen.any():
            right = corrected(lies[seen], verification[seen]) == own[changed][seen]
            recovered[attack.name] = round(float(right.mean()), 4)
    flagged = calibration.p_value(scores) <= rate
    harm = float((corrected(rows.service, rows.verification) != own)[flagged].sum()) / rows.n_rows
    return Readiness(
        rows=rows.n_rows,
        budget=rate,
        agreement=round(rows.agreement, 4),
        caught=caught,
        recovered=recovered,
        harm=round(harm, 5),
    )
