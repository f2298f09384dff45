"""Attacks by name: on a service's answers, on its inputs, on its model."""

from fides_plugins.training.attacks.output import (
    DEFAULT_OUTPUT_ATTACKS,
    GENERATOR,
    AttackRegistry,
    OutputAttack,
    default_registry,
)

__all__ = ["DEFAULT_OUTPUT_ATTACKS", "GENERATOR", "AttackRegistry", "OutputAttack", "default_registry"]
