"""The demonstration itself: train, fit, serve, attack, count."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fides_plugins.demo.compromised import ATTACKS
from fides_plugins.demo.digits import CLASS_NAMES, INPUT_NAME, OUTPUT_NAME, DigitsSplit
from fides_plugins.demo.hosts import Deployment, Host, InProcessHost, Received, latency_ms
from fides_plugins.onnx_model import OnnxModel
from fides_plugins.statistics.intervals import wilson
from fides_plugins.types import BoolArray, Float32Array, IntArray

SERVERS = ("triton", "torchserve", "inprocess")


@dataclass(frozen=True)
class Share:
    """A count of rows with its 95% interval."""

    hits: int
    rows: int

    @property
    def value(self) -> float:
        """Share of rows."""
        return self.hits / self.rows if self.rows else float("nan")

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's, at 95%."""
        return wilson(self.hits, self.rows) if self.rows else (float("nan"), float("nan"))

    def as_json(self) -> dict[str, Any]:
        """For machines."""
        return {**asdict(self), "value": self.value, "interval_95": list(self.interval)}


@dataclass(frozen=True)
class AttackFigures:
    """One attack's figures on held-out rows whose top class the attack changed.

    `recovered` counts a row whose label to use is the honest service's, whether it was caught or not, so
    a lie that passed counts against it.
    """

    attack: str
    caught: Share
    recovered: Share
    recovered_of_caught: Share
    caught_by_disagreement: Share


@dataclass(frozen=True)
class Example:
    """One attacked digit for the pictures."""

    attack: str
    image: Float32Array
    truth: int
    honest: int
    claimed: int
    status: str
    p_value: float
    corrected: int


@dataclass(frozen=True)
class DemoFigures:
    """All that the demonstration found."""

    server: str
    false_alarm_rate: float
    clean_rows: int
    false_alarms: Share
    disagreement_false_alarms: Share
    unanswered: int
    service_accuracy: Share
    agreement: Share
    attacks: tuple[AttackFigures, ...]
    latency_ms: dict[str, float]
    examples: tuple[Example, ...]

    def as_json(self) -> dict[str, Any]:
        """For machines; without the examples, which are pictures."""
        shares = {name: value.as_json() for name, value in vars(self).items() if isinstance(value, Share)}
        attacks = {f.attack: {n: v.as_json() for n, v in vars(f).items() if n != "attack"} for f in self.attacks}
        plain = {name: value for name, value in vars(self).items() if name != "examples"}
        return {**plain, **shares, "attacks": attacks}


def make_host(server: str, deployment: Deployment) -> Host:
    """The host called `server`, one of `SERVERS`."""
    if server == "triton":
        from fides_plugins.demo.triton_host import TritonHost

        return TritonHost(deployment)
    if server == "torchserve":
        from fides_plugins.demo.torchserve_host import TorchServeHost

        return TorchServeHost(deployment)
    return InProcessHost(deployment)


def fit_digits(
    folder: Path, split: DigitsSplit, seed: int, progress: Callable[[str, int, int], None] = lambda *_: None
) -> Path:
    """Fit a bundle for `folder/service.onnx`, as `fides fit` would, without labels; returns its folder."""
    from fides_plugins.training.data import Dataset
    from fides_plugins.training.fit import fit_service

    data = Dataset(images=split.fit.images, class_names=CLASS_NAMES)
    out = folder / "bundle"
    fit_service(str(folder / "service.onnx"), data, out, seed=seed, name="digits", progress=progress)
    return out


def measure(
    host: Host, deployment: Deployment, split: DigitsSplit, tick: Callable[[str], None] = lambda _: None
) -> DemoFigures:
    """Send the held-out digits clean and through each compromised service, and count.

    Parameters
    ----------
    tick:
        Called with the name of each finished part: "clean", each attack, "latency".
    """
    images, labels = split.test.images, split.test.labels
    honest, reference = _labels(deployment.service, images), _reference_labels(deployment.bundle, images)
    clean = host.ask(images)
    tick("clean")
    attacks, examples = [], []
    for attack in ATTACKS:
        answers = host.ask(images, attack)
        # A row whose top class the attack did not change is not a lie, and is not counted.
        lies = answers.claimed != honest
        caught = answers.status == "attacked"
        attacks.append(
            AttackFigures(
                attack,
                _share(caught[lies]),
                _share((answers.label == honest)[lies]),
                _share((answers.label == honest)[lies & caught]),
                _share((reference != answers.claimed)[lies]),
            )
        )
        examples.append(_example(attack, images, labels, honest, answers, lies & caught))
        tick(attack)
    latency = latency_ms(host, images)
    tick("latency")
    return DemoFigures(
        host.name,
        deployment.false_alarm_rate,
        len(images),
        _share(clean.status == "attacked"),
        _share(reference != honest),
        int(np.isin(clean.status, ("indeterminate", "error")).sum()),
        _share(honest == labels),
        _share(reference == honest),
        tuple(attacks),
        latency,
        tuple(e for e in examples if e is not None),
    )


def _share(hits: BoolArray) -> Share:
    return Share(int(np.count_nonzero(hits)), int(np.size(hits)))


def _labels(model: bytes, images: Float32Array) -> IntArray:
    return np.asarray(OnnxModel(model).run({INPUT_NAME: images})[OUTPUT_NAME].argmax(axis=1))


def _reference_labels(folder: Path, images: Float32Array) -> IntArray:
    from fides_plugins.bundle import Bundle

    bundle = Bundle.load(folder)
    spec = bundle.manifest.verification
    assert spec is not None
    return np.asarray(bundle.model(spec).run({spec.input_name: images})[spec.output_name].argmax(axis=1))


def _example(
    attack: str, images: Float32Array, labels: IntArray, honest: IntArray, answers: Received, shown: BoolArray
) -> Example | None:
    rows = np.flatnonzero(shown & (answers.label == honest))
    if not rows.size:
        return None
    row = int(rows[len(rows) // 2])
    return Example(
        attack,
        images[row, 0],
        int(labels[row]),
        int(honest[row]),
        int(answers.claimed[row]),
        str(answers.status[row]),
        float(answers.p_value[row]),
        int(answers.label[row]),
    )
