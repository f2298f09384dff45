"""What can be chosen of a fit."""

from __future__ import annotations

from dataclasses import dataclass

from fides_plugins.training.distil.distillation import DistillationSettings, distillation_temperature
from fides_plugins.types import Float32Array, OutputKind


@dataclass(frozen=True)
class FitOptions:
    """What can be chosen; the defaults are meant to be left alone.

    Attributes
    ----------
    agreement, tolerance:
        Wanted held-out agreement of verification model and service, and what an unfreezing step must add.
    max_cost, max_size:
        The verification model's largest share of the service's multiply-adds and of its parameters.
    max_macs, max_parameters:
        The same as numbers, for services whose cost cannot be counted (endpoints). Both limits hold.
    false_alarm_rate:
        The smallest budget that the calibration must support.
    transfer_rows:
        About how many rows the teacher is asked: the distillation rows and changed copies of them.
    epochs, alpha, beta, fine_tune_rate:
        Of distillation, see `DistillationSettings`.
    temperature:
        Of distillation; None: found by `distillation_temperature`.
    scale:
        Factor for pixel values, see `data.match_input`.
    flip:
        Mirrored copies are fine for these images.
    input_kind:
        One of `kinds.KINDS`; empty: found from the rows.
    augment:
        Whether the service is also asked about changed copies.
    output_kind:
        What the service answers; empty: told by its answers.
    """

    agreement: float = 0.99
    tolerance: float = 0.002
    max_cost: float = 0.125
    max_size: float = 0.1
    max_macs: int | None = None
    max_parameters: int | None = None
    false_alarm_rate: float = 0.01
    transfer_rows: int = 16_000
    epochs: int = 20
    temperature: float | None = None
    alpha: float = 0.8
    beta: float = 0.2
    fine_tune_rate: float = 4e-3
    scale: float | None = None
    flip: bool = False
    input_kind: str = ""
    augment: bool = True
    output_kind: OutputKind | None = None

    def distillation(self, logits: Float32Array) -> DistillationSettings:
        """The part that distillation needs, for a service that gives logits like these (N, K)."""
        temperature = self.temperature or distillation_temperature(logits)
        return DistillationSettings(
            temperature, self.alpha, self.beta, self.epochs, fine_tune_learning_rate=self.fine_tune_rate
        )
