"""What the demonstration asks of every host: predictions with verdicts, honest and attacked, and latency."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fides_plugins.demo.compromised import tamper_logits
from fides_plugins.demo.digits import INPUT_NAME, OUTPUT_NAME
from fides_plugins.onnx_model import OnnxModel
from fides_plugins.protection import Protection
from fides_plugins.settings import Settings
from fides_plugins.types import Float32Array, IntArray, Verdict

if TYPE_CHECKING:
    from typing_extensions import Self

#: Verdicts travel with the answer, and the service's own answer stays visible beside it.
MODE = "flag"


@dataclass(frozen=True)
class Received:
    """What a client got for N rows."""

    claimed: IntArray
    status: NDArray[np.str_]
    label: IntArray
    p_value: Float32Array


@dataclass(frozen=True)
class Deployment:
    """What every host serves."""

    service: bytes
    bundle: Path
    folder: Path
    false_alarm_rate: float
    seed: int


class Host(ABC):
    """A protected service; it runs while the context is open."""

    name: str

    def __init__(self, deployment: Deployment) -> None:
        self.deployment = deployment

    @abstractmethod
    def start(self, stack: ExitStack) -> None:
        """Start what is needed; `stack` gets what ends it."""

    @abstractmethod
    def ask(self, images: Float32Array, attack: str = "") -> Received:
        """Answers for (N, 1, 8, 8) images from the protected service, compromised by `attack` if given."""

    @abstractmethod
    def call(self, image: Float32Array, protected: bool) -> None:
        """One request of one image (1, 1, 8, 8), for timing."""

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self.start(stack)
            self._running = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._running.close()


class InProcessHost(Host):
    """No server: the pipeline in this process, beside the service model."""

    name = "in process"

    def start(self, stack: ExitStack) -> None:
        """See `Host.start`."""
        d = self.deployment
        values = {"bundle": str(d.bundle), "mode": MODE, "false_alarm_rate": d.false_alarm_rate}
        self._service = OnnxModel(d.service, name="service.onnx")
        self._protection = Protection.load(Settings.from_mapping(values))
        stack.callback(self._protection.close)
        self._rng = np.random.default_rng(d.seed)

    def ask(self, images: Float32Array, attack: str = "") -> Received:
        """See `Host.ask`."""
        logits = self._service.run({INPUT_NAME: images})[OUTPUT_NAME]
        if attack:
            logits = tamper_logits(logits, attack, self._rng)
        verdict = self._judge(images, logits)
        return Received(verdict.service_label, verdict.status_text, verdict.label, verdict.p_value)

    def call(self, image: Float32Array, protected: bool) -> None:
        """See `Host.call`."""
        logits = self._service.run({INPUT_NAME: image})[OUTPUT_NAME]
        if protected:
            self._judge(image, logits)

    def _judge(self, images: Float32Array, logits: Float32Array) -> Verdict:
        query = self._protection.query({INPUT_NAME: images}, len(images))
        return self._protection.judge(query, logits, self._protection.verify(query))


def latency_ms(host: Host, images: Float32Array, rounds: int = 200) -> dict[str, float]:
    """Median milliseconds of one request, bare and protected, asked in turns so that noise hits both."""
    times: dict[bool, list[float]] = {False: [], True: []}
    for index in range(rounds):
        image = images[index % len(images)][None]
        for protected in (False, True):
            start = time.perf_counter()
            host.call(image, protected)
            times[protected].append((time.perf_counter() - start) * 1000.0)
    # The first calls pay for lazy start-up on every host.
    bare, protected_ms = (float(np.median(times[p][rounds // 10 :])) for p in (False, True))
    return {"bare": bare, "protected": protected_ms}
