"""Lies of no attack in particular, for the re-classifier: who wins, and where the right class goes.

A re-classifier that learns from named attacks alone learns their habits. Where all of them leave the right class
second, it takes the runner-up, and is lost when an attack that it never saw puts the right class elsewhere. Every lie
about the class makes two choices, a winner and a place for the class that was right; here they are made independently,
and neither is a habit. What is left to go by is what no lie can change: the verification model's answer, and how honest
answers of the two models go together.
"""

from __future__ import annotations

import numpy as np

from fides_plugins.types import Float32Array, IntArray

#: Share of rows in which the runner-up wins, and in which the right class comes second.
SECOND = 0.45


def misplace(probabilities: Float32Array, rng: np.random.Generator) -> Float32Array:
    """Name another class in every row.

    A share `SECOND` of the rows name their runner-up, the others any class; independently, the right class becomes
    second in as many and goes to any lower place in the others. All other classes keep their order. The probabilities
    stay the same numbers, or, in half of the rows, the winner is as sure as it likes.

    Parameters
    ----------
    probabilities:
        (N, K) clean answers.
    rng:
        Source of every random choice.

    Returns
    -------
    (N, K) float32; rows sum to one.
    """
    n, k = probabilities.shape
    rows, ranks = np.arange(n), np.arange(k)
    order = np.argsort(-probabilities, axis=1, kind="stable")
    values = np.take_along_axis(probabilities, order, axis=1)

    def second_or_any() -> IntArray:
        return np.where(rng.random(n) < SECOND, 1, rng.integers(1, k, size=n))

    winner, place = second_or_any(), second_or_any()
    # Sort keys of the old ranks: the winner first, the right class before the one that stands at its new place.
    keys = (ranks - 1.0) - (ranks > winner[:, None])
    keys[rows, winner] = -2.0
    keys[:, 0] = place - 1.5
    classes = np.take_along_axis(order, np.argsort(keys, axis=1), axis=1)

    rest = values[:, 1:].sum(axis=1)
    least = 1.001 * values[:, 1] / np.maximum(values[:, 1] + rest, 1e-30)
    sure = np.where(rng.random(n) < 0.5, values[:, 0], np.maximum(rng.uniform(0.3, 1.0, size=n), least))
    values = values * ((1.0 - sure) / np.maximum(rest, 1e-30))[:, None]
    values[:, 0] = sure
    lies = np.empty_like(probabilities)
    np.put_along_axis(lies, classes, values.astype(np.float32), axis=1)
    return lies
