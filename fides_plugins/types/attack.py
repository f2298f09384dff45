"""An attack, as seen by code that only needs its name.

The attacks themselves are in `training/attacks/`, several layers above the hooks, which must not import it.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable


@runtime_checkable
class Attack(Protocol):
    """What every kind of attack has."""

    @property
    def name(self) -> str:
        """Unique name, as in `fides evaluate`'s table."""

    @property
    def kind(self) -> str:
        """ "output", "input" or "model"."""

    @property
    def summary(self) -> str:
        """One line for people."""
