"""References with few decimals: what an extractor of the model learns per request, without breaking the receipt."""

from __future__ import annotations

import numpy as np

from fides_plugins.types import Float32Array


def round_rows(probabilities: Float32Array, decimals: int) -> Float32Array:
    """Round rows so that each still sums to one: the largest-remainder method.

    Every value is rounded down to a multiple of 10^-decimals, and what is missing from one goes, a step each,
    to the classes that lost most. No class overtakes another; classes that lost the same are served in order.

    Parameters
    ----------
    probabilities:
        (N, K). Rows of zeros, the verifier's "no answer", stay as they are.
    decimals:
        Places, from 1 to 9.
    """
    steps = 10**decimals
    exact = probabilities.astype(np.float64)
    sums = exact.sum(axis=1, keepdims=True)
    exact *= np.divide(steps, sums, out=np.zeros_like(sums), where=sums > 0)
    counts = np.floor(exact)
    missing = np.where(sums > 0, steps, 0) - counts.sum(axis=1, keepdims=True)
    order = np.argsort(counts - exact, axis=1, kind="stable")
    places = np.empty_like(order)
    np.put_along_axis(places, order, np.arange(order.shape[1])[None, :], axis=1)
    counts += places < missing
    rounded: Float32Array = (counts / steps).astype(np.float32)
    return rounded
