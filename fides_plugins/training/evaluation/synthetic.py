"""Pairs of answers made up from a simple model of two networks, for tests, studies and first steps."""

from __future__ import annotations

import numpy as np

from fides_plugins.training.predictions import Predictions
from fides_plugins.types import softmax


def synthetic_pair(
    n_rows: int,
    n_classes: int,
    *,
    signal: float = 5.0,
    own_noise: float = 0.6,
    service_scale: float = 1.5,
    verification_scale: float = 1.5,
    with_labels: bool = True,
    seed: int = 0,
) -> Predictions:
    """Answers of two models that saw the same inputs.

    Both see the true class's evidence, `signal`, and the same unit Gaussian noise over the classes (hard
    inputs are hard for both, and classes next to each other are mixed up more often); each adds noise of
    its own. Agreement falls with `own_noise`, accuracy rises with `signal`.

    Parameters
    ----------
    n_rows, n_classes:
        N and K.
    signal, own_noise:
        In units of the shared noise.
    service_scale, verification_scale:
        What the evidence is multiplied by to give logits: large means overconfident.
    with_labels:
        Whether the true classes are part of the pair.
    seed:
        Of everything.
    """
    rng = np.random.default_rng(seed)
    labels = rng.integers(n_classes, size=n_rows)
    shared = rng.standard_normal((n_rows, n_classes))
    # A class looks a little like its neighbours: smooth the noise over the ring of classes.
    shared = (shared + 0.7 * np.roll(shared, 1, axis=1)) / np.sqrt(1.49)
    shared[np.arange(n_rows), labels] += signal
    service, verification = (
        softmax(scale * (shared + own_noise * rng.standard_normal(shared.shape)))
        for scale in (service_scale, verification_scale)
    )
    return Predictions.check(service, verification, labels if with_labels else None)
