"""Attacks on the input: FGSM, PGD and Carlini-Wagner on the service, by the Adversarial Robustness Toolbox.

Both models see the perturbed input, so what counts is how far an attack made for the service carries over
to the verification model. Rows that the service still answers as before are not counted as attacked.

Sources: Goodfellow et al. 2015 (FGSM), Madry et al. 2018 (PGD), Carlini and Wagner 2017 (L2).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fides_plugins.errors import TrainingError
from fides_plugins.training.attacks.model import ServiceAttack, Victim, logits_of
from fides_plugins.training.predictions import AttackedRows


@dataclass(frozen=True)
class InputAttack:
    """One attack of the toolbox.

    Attributes
    ----------
    method:
        Its class in `art.attacks.evasion`.
    distances, options:
        Arguments of the class: changes of a value, as shares of the images' range, and others.
    """

    name: str
    summary: str
    method: str
    distances: Mapping[str, float] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    kind: ClassVar[str] = "input"

    def run(self, victim: Victim, seed: int) -> AttackedRows:
        """Perturb the victim's rows away from the service's own class, and ask both models.

        Raises
        ------
        TrainingError
            If the service is no torch module, takes no floats, or the toolbox is not installed.
        """
        images = self.perturb(victim, seed)
        return victim.attacked(self, images, victim.service(images))

    def perturb(self, victim: Victim, seed: int) -> NDArray[Any]:
        """The victim's rows (N, ...), perturbed; within the range of the clean ones."""
        try:
            from art.attacks import evasion
            from art.estimators.classification import PyTorchClassifier
        except ImportError as error:
            raise TrainingError(
                "Input attacks need the Adversarial Robustness Toolbox.", "pip install 'fides-plugins[attacks]'"
            ) from error
        import torch
        from torch import nn

        clean = victim.images
        if clean.dtype != np.float32:
            raise TrainingError(f"The attack {self.name!r} needs float32 images, not {clean.dtype}.")
        module = victim.module(self.name)
        honest = victim.service(clean)
        low, high = float(clean.min()), float(clean.max())
        classifier = PyTorchClassifier(
            model=logits_of(module, victim.codec),
            loss=nn.CrossEntropyLoss(),
            input_shape=clean.shape[1:],
            nb_classes=honest.n_classes,
            clip_values=(low, high),
            device_type="cpu",
        )
        state = np.random.get_state()  # the toolbox draws from numpy's global generator
        try:
            np.random.seed(seed % 2**32)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                distances = {name: share * (high - low) for name, share in self.distances.items()}
                attack = getattr(evasion, self.method)(classifier, batch_size=128, **distances, **self.options)
                # The service's own answer is what the attack leads away from: no labels are needed.
                perturbed = attack.generate(x=clean, y=np.eye(honest.n_classes, dtype=np.float32)[honest.label])
        finally:
            np.random.set_state(state)
            module.eval()
        return np.ascontiguousarray(np.clip(perturbed, low, high), dtype=np.float32)


#: The smallest change that works: confidence 0. A large rate with a short line search
#: changed 99 of 100 digits in 13 s, where a rate of 0.01 and five halvings changed 22 in 127 s.
_CARLINI_WAGNER = {
    "confidence": 0.0,
    "learning_rate": 0.1,
    "initial_const": 1.0,
    "max_iter": 20,
    "binary_search_steps": 3,
    "max_halving": 1,
    "max_doubling": 1,
    "verbose": False,
}


def input_attacks() -> Mapping[str, ServiceAttack]:
    """The built-in input attacks by name."""
    attacks: tuple[ServiceAttack, ...] = (
        InputAttack("fgsm", "one gradient step on the input, 15% of the range", "FastGradientMethod", {"eps": 0.15}),
        InputAttack(
            "pgd",
            "20 projected gradient steps on the input, 15% of the range",
            "ProjectedGradientDescent",
            {"eps": 0.15, "eps_step": 0.03},
            {"max_iter": 20, "verbose": False},
        ),
        InputAttack(
            "carlini_wagner",
            "smallest L2 change of the input that changes the class",
            "CarliniL2Method",
            options=_CARLINI_WAGNER,
        ),
    )
    return {attack.name: attack for attack in attacks}
