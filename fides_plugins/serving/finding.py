"""What `fides check` finds, on any host."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class CheckFinding:
    """One thing that was looked at.

    Attributes
    ----------
    what:
        The step or property.
    good:
        Whether it is as it should be; None where that could not be seen.
    detail:
        What was seen.
    remedy:
        How to fix it; empty where there is nothing to fix, or no fix is known.
    seconds:
        Time of the inference; NaN where there was none.
    """

    what: str
    good: bool | None
    detail: str
    remedy: str = ""
    seconds: float = math.nan
