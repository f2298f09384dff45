"""The attacker's side of the demonstration: a service that tampers with its own answers."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fides_plugins.training.attacks import default_registry
from fides_plugins.types import softmax

ATTACKS = ("switch", "random", "average")


def tamper_logits(logits: NDArray[Any], attack: str, rng: np.random.Generator) -> NDArray[np.float32]:
    """Apply an output attack to logits.

    The attacked probabilities go back to logits with the row's own log-sum-exp, so that the scale of the
    numbers does not give the lie away.

    Parameters
    ----------
    logits:
        (N, K) honest logits.
    attack:
        Name of an output attack.
    rng:
        Source of its random choices.
    """
    attacked, _ = default_registry().output(attack).apply(softmax(logits), rng)
    peak = logits.max(axis=1, keepdims=True)
    log_sum = peak + np.log(np.exp(logits - peak).sum(axis=1, keepdims=True))
    return np.asarray(np.log(np.maximum(attacked, 1e-30)) + log_sum, dtype=np.float32)
