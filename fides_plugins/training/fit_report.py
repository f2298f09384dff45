"""What a fit made and how well it does: printed at its end, passed between workers, written as JSON."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fides_plugins.training.costs import Cost
from fides_plugins.training.distil.gdtl import SearchStep
from fides_plugins.training.evaluation.forms import FormCost


@dataclass(frozen=True)
class FitReport:
    """What was made, and how well it does on rows that no training saw.

    Attributes
    ----------
    bundle, digest:
        Folder and digest of the bundle.
    service, service_cost, verification_cost:
        Name of the service, and both models' parameters and multiply-adds (None where unknown).
    student, steps, reached:
        The chosen student, the trade-off table, and whether the wanted agreement was reached on the
        selection rows.
    agreement:
        On the calibration rows, which had no part in distillation, selection or the training of the detector.
    service_accuracy, verification_accuracy:
        There, where labels are known.
    rows:
        Number of rows in each part.
    asked, remembered:
        Rows the service answered, and rows found in the cache of an earlier run.
    scale:
        Factor that was applied to the pixel values.
    kind, changes:
        A line about the kind of input, and the changes tried on copies with the share of rows that kept their class.
    readiness:
        JSON of `fides_plugins.readiness.Readiness`.
    told_form, forms:
        The coarse form that the service answers in (empty: none), and what share of lies would be caught in others.
    seconds:
        By stage.
    """

    bundle: str
    digest: str
    service: str
    service_cost: Cost | None
    verification_cost: Cost
    student: str
    steps: tuple[SearchStep, ...]
    reached: bool
    agreement: float
    service_accuracy: float | None
    verification_accuracy: float | None
    rows: dict[str, int]
    asked: int
    remembered: int
    scale: float
    readiness: dict[str, Any] = field(default_factory=dict)
    kind: str = ""
    changes: dict[str, float] = field(default_factory=dict)
    told_form: str = ""
    forms: tuple[FormCost, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)
