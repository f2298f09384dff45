"""Both models' answers to data, and the attacks that need the service itself."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fides_plugins.bundle import Bundle
from fides_plugins.errors import TrainingError
from fides_plugins.training.attacks.input import input_attacks
from fides_plugins.training.attacks.model import Victim, model_attacks
from fides_plugins.training.data import load_data, match_input
from fides_plugins.training.predictions import AttackedRows, Predictions
from fides_plugins.training.service.teacher import Teacher
from fides_plugins.training.service.teachers import AnswerCache, TorchTeacher

#: Rows that attacks on inputs and models are tried on; some take many gradient steps per row.
ATTACKED_ROWS = 512
#: Fewer rows than this teach a substitute or a backdoor nothing.
MIN_ATTACKER_ROWS = 256


@dataclass(frozen=True)
class ServiceRows:
    """Clean rows of a service, attacks that looked inside it, and those that could not be made.

    Attributes
    ----------
    rows:
        Both models' clean answers.
    images:
        (N, ...) what both were asked, in the service's dtype.
    attacked:
        Attacks on inputs and on the model.
    skipped:
        Name and reason of each attack that could not be made.
    """

    rows: Predictions
    images: NDArray[Any]
    attacked: Sequence[AttackedRows]
    skipped: dict[str, str]


def ask_service(
    bundle: Bundle,
    teacher: Teacher,
    data: str | Path,
    *,
    cache: str | Path | None = None,
    attack_model: bool = True,
    seed: int = 0,
    progress: Callable[[str, float], None] | None = None,
) -> ServiceRows:
    """Ask both models about every row of `data`.

    Parameters
    ----------
    bundle:
        With a verification model.
    teacher:
        The honest service.
    data:
        What `load_data` understands; rows that the bundle was not fitted on.
    cache:
        Folder for the service's answers, so that an interrupted run goes on; None keeps nothing.
    attack_model:
        Whether to try the input and model attacks; only a service that can be looked into is attacked.
    seed:
        Of these attacks.
    progress:
        Told what is being done, and the share done.

    Raises
    ------
    TrainingError
        If the bundle has no verification model, or service and data don't fit it.
    """
    tell = progress or (lambda what, done: None)
    manifest = bundle.manifest
    if manifest.verification is None or manifest.input is None:
        raise TrainingError(
            "The bundle holds no verification model to ask about data.",
            "Evaluate it with --predictions, or fit it with --service and --data.",
        )
    spec = manifest.input
    scale = manifest.provenance.get("data", {}).get("scale")
    dataset = load_data(data, spec)
    integers = dataset.images.dtype == np.uint8
    dataset, _ = match_input(dataset, spec, float(scale) if scale is not None and integers else None)
    dataset.check_labels(bundle.n_classes)
    total = len(dataset.images)
    raw = AnswerCache(teacher, cache).ask(dataset.images, lambda done: tell("asking the service", done / total))
    victim = Victim(teacher, bundle, dataset.images)
    rows = Predictions.of(victim.codec.read(raw), victim.verification(dataset.images), dataset.labels)
    attacked, skipped = _attack(victim, seed, tell) if attack_model else ([], {})
    return ServiceRows(rows, dataset.images, attacked, skipped)


def _attack(victim: Victim, seed: int, tell: Callable[[str, float], None]) -> tuple[list[AttackedRows], dict[str, str]]:
    rest = victim.images[ATTACKED_ROWS:]
    # A substitute and a backdoor have to be trained; the attacker uses rows of the same kind, never the attacked ones.
    training = rest if len(rest) >= MIN_ATTACKER_ROWS else None
    some = replace(victim, images=victim.images[:ATTACKED_ROWS], training_images=training)
    names = None
    if not isinstance(victim.teacher, TorchTeacher):
        # Only a torch module has gradients and can be trained further; asking an endpoint would be in vain.
        names = ("bit_flips", "label_permutation")
    return attack_from_inside(some, seed, names, tell)


def attack_from_inside(
    victim: Victim,
    seed: int,
    names: Collection[str] | None = None,
    tell: Callable[[str, float], None] = lambda what, share: None,
) -> tuple[list[AttackedRows], dict[str, str]]:
    """Run the attacks on inputs and on the model.

    Parameters
    ----------
    names:
        Of the attacks to run; all by default.
    tell:
        Told which attack is run, and the share of the work done.

    Returns
    -------
    The attacks that changed some row's class, and name and reason of each one that could not be made.
    """
    made: list[AttackedRows] = []
    skipped: dict[str, str] = {}
    attacks = {n: a for n, a in {**input_attacks(), **model_attacks()}.items() if names is None or n in names}
    for i, (name, attack) in enumerate(attacks.items()):
        tell(f"attack {name}", i / len(attacks))
        try:
            found = attack.run(victim, seed)
        except TrainingError as error:
            skipped[name] = error.cause_text
            continue
        if len(found.rows):
            made.append(found)
        else:
            skipped[name] = "It changed no row's class, so there was nothing to catch."
    return made, skipped
