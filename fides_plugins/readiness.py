"""How ready a bundle is for each mode: what its fit measured on rows that trained nothing, and a grade from it."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fides_plugins.bundle import Bundle
from fides_plugins.errors import SettingsError
from fides_plugins.settings import Mode

#: Key of a bundle's provenance.
KEY = "readiness"
#: Below the first number a mode fails, below the second it gets a warning.
AGREEMENT = (0.7, 0.85)
CAUGHT = (0.1, 0.5)
RECOVERED = (0.7, 0.9)
#: A share that rests on fewer rows is told with a warning.
FEW_ROWS = 300


class Graded(NamedTuple):
    """PASS, WARN or FAIL, and one sentence that says why."""

    grade: Literal["PASS", "WARN", "FAIL"]
    why: str


class Readiness(BaseModel):
    """What was measured on the calibration rows."""

    model_config = ConfigDict(frozen=True)

    rows: int = Field(ge=1, description="Calibration rows.")
    budget: float = Field(description="False-alarm rate at which `caught` was measured.")
    agreement: float = Field(description="Share of honest rows on which both models name the same class.")
    caught: dict[str, float] = Field(description="By attack, share of lies caught at the budget.")
    recovered: dict[str, float] = Field(description="By attack, share of caught lies corrected to the service's class.")
    harm: float = Field(description="Share of honest rows that `correct` would give another class.")

    @classmethod
    def of(cls, bundle: Bundle) -> Readiness | None:
        """A bundle's; None where its fit measured none."""
        try:
            return cls.model_validate(bundle.manifest.provenance.get(KEY))
        except ValidationError:
            return None

    def grade(self, mode: Mode) -> Graded:
        """Whether the bundle may be used in a mode."""
        caught = float(np.mean(list(self.caught.values()))) if self.caught else 0.0
        facts = [("lies caught", caught, CAUGHT)]
        if mode == "correct":
            facts += [("agreement of the two models", self.agreement, AGREEMENT)]
            facts += [("caught lies corrected rightly", min(self.recovered.values(), default=0.0), RECOVERED)]
        worst = min(range(len(facts)), key=lambda i: _level(facts[i]))
        level, (what, value, _) = _level(facts[worst]), facts[worst]
        few = f" It rests on {self.rows} rows." if self.rows < FEW_ROWS else ""
        if mode == "observe":
            # Nothing is changed there, so the worst that can be is an alarm that does not come.
            level = max(level, 1)
        if few:
            level = min(level, 1)
        if level == 2:
            return Graded("PASS", f"{what}: {value:.0%}.")
        return Graded("WARN" if level else "FAIL", f"{what}: {value:.0%}.{few}")

    def sentence(self) -> str:
        """One line for people: what to expect."""
        lies = ", ".join(f"{share:.0%} of {attack}" for attack, share in self.caught.items())
        return (
            f"Expected at {self.budget:.3g} false alarms: {lies} caught; the two models agree on {self.agreement:.1%}; "
            f"`correct` would change {self.harm:.2%} of honest answers. Measured on {self.rows:,} rows."
        )

    def table(self) -> list[tuple[str, str, str]]:
        """(mode, grade, why) of every mode."""
        modes: tuple[Mode, ...] = ("observe", "flag", "correct", "reject")
        return [(mode, *self.grade(mode)) for mode in modes]


def require_ready(bundle: Bundle, mode: Mode, force: bool = False) -> Graded | None:
    """The grade of a mode; None where the bundle has none.

    Raises
    ------
    SettingsError
        If it is FAIL and not forced.
    """
    readiness = Readiness.of(bundle)
    if readiness is None:
        return None
    graded = readiness.grade(mode)
    if graded.grade == "FAIL" and not force:
        raise SettingsError(
            f"The bundle {bundle.manifest.name!r} is not ready for the mode {mode!r}: {graded.why}",
            "Fit it on more or better rows, use `observe`, or insist with --force.",
        )
    return graded


def _level(fact: tuple[str, float, tuple[float, float]]) -> int:
    _, value, (fail, warn) = fact
    return 0 if value < fail else 1 if value < warn else 2
