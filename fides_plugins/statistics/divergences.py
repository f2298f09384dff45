"""Named divergences between two batches of class distributions.

Every function takes p and q, (N, K) float, rows sum to one, and returns (N,) float64 in nats where a
logarithm is involved. p is the service's distribution, q the reference. Probabilities are clipped to
`EPSILON`, so every value is finite. Where the service's is divided by, it is clipped to `SERVICE_FLOOR`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
from numpy.typing import ArrayLike

from fides_plugins.errors import SettingsError
from fides_plugins.types import Float32Array, Float64Array

EPSILON = 1e-7
#: A service's probabilities below this tell nothing: six decimals end at 5e-7, float16 at 6e-8, and some services put
#: a floor of 1e-7 or 1e-6 under them. Their logarithm would hang on how the answer is written.
SERVICE_FLOOR = 1e-5

Divergence = Callable[[ArrayLike, ArrayLike], Float64Array]


def _clip(p: ArrayLike) -> Float64Array:
    return np.clip(np.asarray(p, dtype=np.float64), EPSILON, 1.0)


def entropy(p: ArrayLike) -> Float64Array:
    """Shannon entropy -sum p log p, in nats."""
    a = _clip(p)
    return np.asarray(-(a * np.log(a)).sum(axis=-1))


def cross_entropy(p: ArrayLike, q: ArrayLike) -> Float64Array:
    """-sum p log q, in nats: the one feature that the Fides prototypes use."""
    return np.asarray(-(_clip(p) * np.log(_clip(q))).sum(axis=-1))


def kl(p: ArrayLike, q: ArrayLike) -> Float64Array:
    """Kullback-Leibler divergence of the service from the reference, sum p log(p/q), in nats."""
    a, b = _clip(p), _clip(q)
    return np.asarray(np.maximum((a * (np.log(a) - np.log(b))).sum(axis=-1), 0.0))


def kl_reverse(p: ArrayLike, q: ArrayLike) -> Float64Array:
    """Kullback-Leibler divergence of the reference from the service, sum q log(q/p), in nats."""
    return kl(q, np.maximum(p, SERVICE_FLOOR))


def jeffreys(p: ArrayLike, q: ArrayLike) -> Float64Array:
    """Jeffreys divergence: the sum of both Kullback-Leibler divergences, in nats."""
    return kl(p, q) + kl_reverse(p, q)


def js(p: ArrayLike, q: ArrayLike) -> Float64Array:
    """Jensen-Shannon divergence (Lin 1991), in [0, log 2] nats."""
    m = 0.5 * (_clip(p) + _clip(q))
    return 0.5 * kl(p, m) + 0.5 * kl(q, m)


def total_variation(p: ArrayLike, q: ArrayLike) -> Float64Array:
    """Half the sum of absolute differences, in [0, 1]."""
    return np.asarray(0.5 * np.abs(np.asarray(p, np.float64) - np.asarray(q, np.float64)).sum(axis=-1))


def wasserstein(p: ArrayLike, q: ArrayLike) -> Float64Array:
    """First Wasserstein distance with |i - j| between class indices, divided by K - 1, in [0, 1].

    On the line it is the area between the two cumulative distributions (Vallender 1974). It depends on
    the order of the classes; with nominal classes read it beside total variation.
    """
    difference = np.cumsum(np.asarray(p, np.float64) - np.asarray(q, np.float64), axis=-1)
    k = difference.shape[-1]
    return np.asarray(np.abs(difference[..., :-1]).sum(axis=-1) / (k - 1))


DIVERGENCES: Mapping[str, Divergence] = MappingProxyType(
    {
        "kl": kl,
        "kl_reverse": kl_reverse,
        "js": js,
        "jeffreys": jeffreys,
        "wasserstein": wasserstein,
        "total_variation": total_variation,
        "cross_entropy": cross_entropy,
    }
)


def divergence(name: str) -> Divergence:
    """The divergence called `name`.

    Raises
    ------
    SettingsError
        Listing the known names.
    """
    try:
        return DIVERGENCES[name]
    except KeyError:
        raise SettingsError(f"Unknown divergence {name!r}.", f"Known are: {', '.join(DIVERGENCES)}.") from None


def score(name: str, p: ArrayLike, q: ArrayLike) -> Float32Array:
    """(N,) float32 in [0, 1]: 1 - exp(-divergence), monotone in it, so thresholds mean the same."""
    return np.asarray(1.0 - np.exp(-divergence(name)(p, q)), dtype=np.float32)
