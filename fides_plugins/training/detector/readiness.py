"""Measures how ready freshly trained detection is, on the rows that calibrated it."""

from __future__ import annotations

import numpy as np

from fides_plugins.onnx_model import OnnxModel
from fides_plugins.readiness import Readiness
from fides_plugins.statistics.conformal import Calibration
from fides_plugins.training.attacks import default_registry
from fides_plugins.training.predictions import Predictions, run_graph
from fides_plugins.types import Float32Array, IntArray

#: Two lies of the built-in ones: the hardest to see, and the plainest.
ATTACKS = ("switch", "random")


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
    for name in ATTACKS:
        lies, changed = (
            default_registry().output(name).apply(rows.service, np.random.default_rng((seed, *name.encode())))
        )
        lies, verification = lies[changed], rows.verification[changed]
        if not len(lies):
            continue
        seen = calibration.p_value(run_graph(detector, "score", service=lies, verification=verification)) <= rate
        caught[name] = round(float(seen.mean()), 4)
        if seen.any():
            right = corrected(lies[seen], verification[seen]) == own[changed][seen]
            recovered[name] = round(float(right.mean()), 4)
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
