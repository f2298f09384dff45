"""How uncertain a share is that was counted in some rows."""

from __future__ import annotations

import math

#: Of the standard normal distribution: 95%, two-sided.
Z_95 = 1.959964


def wilson(hits: float, rows: float, z: float = Z_95) -> tuple[float, float]:
    """The interval of a share of independent rows: the shares with which `hits` of `rows` is not surprising.

    Wilson 1927; Brown, Cai, DasGupta, "Interval Estimation for a Binomial Proportion", Statistical Science 16,
    2001. It has a width even at shares of 0 and 1. Without rows it is (0, 1).
    """
    if not rows:
        return 0.0, 1.0
    share, spread = hits / rows, z**2 / rows
    middle = share + spread / 2.0
    half = math.sqrt(spread * (share * (1.0 - share) + spread / 4.0))
    # Rounding must not push the share itself out of its interval.
    low, high = (middle - half) / (1.0 + spread), (middle + half) / (1.0 + spread)
    return max(0.0, min(low, share)), min(1.0, max(high, share))
