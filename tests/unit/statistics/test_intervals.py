from __future__ import annotations

from fides_plugins.statistics.intervals import wilson


def test_wilson_interval() -> None:
    """Against the values of Newcombe (1998), table I: 81 of 263."""
    low, high = wilson(81, 263)
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
    assert wilson(0, 0) == (0.0, 1.0)
