"""Pairs of predictions: what both models answered on the same rows, and nothing else.

The file format (`.npz`): `service_logits` or `service_probabilities`, `verification_logits` or
`verification_probabilities`, all (N, K), and optionally `labels` (N,). With it a detector can be fitted
and judged without any model at hand.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fides_plugins.array_files import open_npz
from fides_plugins.codec import OutputCodec
from fides_plugins.errors import InputError, TrainingError
from fides_plugins.onnx_model import OnnxModel
from fides_plugins.types import BoolArray, Float32Array, IntArray, OutputKind, Prediction

#: Rows per call of a graph: 1,000 classes then stay within a few hundred MB.
_CHUNK = 1024
#: Reads what is a distribution already.
PROBABILITIES = OutputCodec("probabilities")

_ARRAYS = (
    "`service_logits` or `service_probabilities`, `verification_logits` or `verification_probabilities`, "
    "and optionally `labels`"
)


@dataclass(frozen=True, eq=False)
class Predictions:
    """Both models' answers on the same N rows.

    Attributes
    ----------
    service, verification:
        (N, K) float32, rows sum to one. `service` is clean: what the un-attacked service answered.
    labels:
        (N,) int64 in [0, K), or None.
    service_codec:
        What the service's answers were read with.
    """

    service: Float32Array
    verification: Float32Array
    labels: IntArray | None = None
    service_codec: OutputCodec = PROBABILITIES

    @classmethod
    def check(
        cls,
        service: ArrayLike,
        verification: ArrayLike,
        labels: ArrayLike | None = None,
        *,
        service_codec: OutputCodec = PROBABILITIES,
        verification_codec: OutputCodec = PROBABILITIES,
    ) -> Predictions:
        """Predictions from raw outputs, (N, K) or what else the codecs read.

        Raises
        ------
        TrainingError
            If shapes differ, a row is not finite or no distribution, or a label is out of range; the
            message names the array and the first bad row.
        """
        names = (f"service_{service_codec.kind}", f"verification_{verification_codec.kind}")
        pair = _read(service, service_codec, names[0]), _read(verification, verification_codec, names[1])
        return cls.of(*pair, labels, service_codec, names)

    @classmethod
    def of(
        cls,
        service: Prediction,
        verification: Prediction,
        labels: ArrayLike | None = None,
        service_codec: OutputCodec = PROBABILITIES,
        names: tuple[str, str] = ("service", "verification"),
    ) -> Predictions:
        """Predictions from answers that are read already; raises as `check` does, with these names."""
        s, v = _valid(service, names[0]), _valid(verification, names[1])
        if s.shape[1] != v.shape[1]:
            raise TrainingError(
                f"The service has {s.shape[1]} classes, the verification model {v.shape[1]}.",
                "Both must answer over the same classes in the same order.",
            )
        if len(s) != len(v):
            raise TrainingError(
                f"The service has {len(s)} rows, the verification model {len(v)}.", "Both must answer the same inputs."
            )
        if not len(s):
            raise TrainingError("There are no rows.", "Give predictions for at least a few hundred inputs.")
        return cls(s, v, _labels(labels, *s.shape), service_codec)

    @property
    def n_rows(self) -> int:
        """N, the number of rows."""
        return len(self.service)

    @property
    def n_classes(self) -> int:
        """K, the number of classes."""
        return int(self.service.shape[1])

    @property
    def agreement(self) -> float:
        """Share of rows on which both models choose the same class."""
        return float((self.service.argmax(axis=1) == self.verification.argmax(axis=1)).mean())

    def take(self, rows: IntArray | BoolArray) -> Predictions:
        """The chosen rows."""
        labels = None if self.labels is None else self.labels[rows]
        service, verification = (np.ascontiguousarray(p[rows]) for p in (self.service, self.verification))
        return Predictions(service, verification, labels, self.service_codec)

    def split(self, fraction: float, seed: int) -> tuple[Predictions, Predictions]:
        """Two disjoint parts at random; the first has ceil((1 - fraction) N) rows."""
        order = np.random.default_rng(seed).permutation(self.n_rows)
        cut = self.n_rows - int(fraction * self.n_rows)
        return self.take(np.sort(order[:cut])), self.take(np.sort(order[cut:]))


@dataclass(frozen=True, eq=False)
class AttackedRows:
    """One attack on clean rows.

    Attributes
    ----------
    name, summary:
        Of the attack.
    service, verification:
        (m, K) both models' answers under attack.
    rows:
        (m,) index of the clean row that each was made from.
    """

    name: str
    summary: str
    service: Float32Array
    verification: Float32Array
    rows: IntArray


def load_predictions(
    path: str | Path, service_temperature: float = 1.0, verification_temperature: float = 1.0
) -> Predictions:
    """Read a predictions file. The temperatures divide logits, as the bundle's do.

    Raises
    ------
    TrainingError
        If the file cannot be read, arrays are missing, or their contents do not fit.
    """
    name = Path(path).name
    wanted = [f"{side}_{kind}" for side in ("service", "verification") for kind in ("logits", "probabilities")]
    try:
        with open_npz(Path(path)) as archive:
            arrays, names = archive.read(*wanted, "labels"), sorted(archive.names)
    except InputError as error:
        raise TrainingError(error.cause_text, error.remedy) from None
    outputs: list[NDArray[Any]] = []
    codecs: list[OutputCodec] = []
    for side, temperature in (("service", service_temperature), ("verification", verification_temperature)):
        kinds: list[OutputKind] = [k for k in ("logits", "probabilities") if f"{side}_{k}" in arrays]
        if not kinds:
            raise TrainingError(
                f"{name} has neither `{side}_logits` nor `{side}_probabilities`; it has {names}.",
                f"A predictions file holds {_ARRAYS}.",
            )
        outputs.append(arrays[f"{side}_{kinds[0]}"])
        codecs.append(OutputCodec(kinds[0], temperature))
    return Predictions.check(
        outputs[0], outputs[1], arrays.get("labels"), service_codec=codecs[0], verification_codec=codecs[1]
    )


def run_graph(model: OnnxModel, output: str, **inputs: NDArray[Any]) -> Float32Array:
    """One output of a graph over many rows, in chunks."""
    n = len(next(iter(inputs.values())))
    parts = [
        model.run({k: np.ascontiguousarray(a[i : i + _CHUNK]) for k, a in inputs.items()})[output]
        for i in range(0, max(n, 1), _CHUNK)
    ]
    return np.concatenate(parts)


def _read(values: ArrayLike, codec: OutputCodec, what: str) -> Prediction:
    try:
        return codec.read(values)
    except InputError as error:
        raise TrainingError(f"`{what}`: {error.cause_text}", error.remedy) from None


def _valid(prediction: Prediction, what: str) -> Float32Array:
    bad = np.flatnonzero(~prediction.valid)
    if len(bad):
        raise TrainingError(
            f"`{what}` has {len(bad)} row(s) that are not finite or no distribution, the first is row {bad[0]}.",
            "Remove these rows from every array, or find out why the model gave them.",
        )
    return prediction.probabilities


def _labels(labels: ArrayLike | None, n: int, k: int) -> IntArray | None:
    if labels is None:
        return None
    raw = np.asarray(labels)
    if raw.shape != (n,) or raw.dtype.kind not in "iu":
        raise TrainingError(
            f"`labels` has shape {raw.shape} and dtype {raw.dtype}; expected ({n},) whole numbers.",
            "Give one class index per row, or leave the labels out.",
        )
    bad = np.flatnonzero((raw < 0) | (raw >= k))
    if len(bad):
        raise TrainingError(
            f"`labels` has {len(bad)} value(s) outside 0..{k - 1}, the first is {raw[bad[0]]} in row {bad[0]}.",
            "Labels are class indices that start at 0.",
        )
    return raw.astype(np.int64)
