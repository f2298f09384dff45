"""How class numbers are read from a model's output and written back into it: the one place where it is done.

Training, calibration, hosts, clients and the batch run read answers through an `OutputCodec`, and so see the same
probabilities, to the bit. A detector is calibrated on what it will be shown.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fides_plugins.errors import InputError
from fides_plugins.types import Float32Array, OutputKind, Prediction, Verdict

#: Smallest probability of which a logarithm is taken: log(1e-7) is -16.1, which float16 holds well.
SMALLEST_PROBABILITY = 1e-7
#: Numbers of decimals that cost detection something, and how many numbers must have as few to tell.
COARSE_DECIMALS = (4, 3, 2)
_ENOUGH = 20


@dataclass(frozen=True)
class OutputCodec:
    """What a class output holds.

    Attributes
    ----------
    kind:
        "logits" (log-probabilities are a kind of them) or "probabilities".
    temperature:
        T: logits z stand for softmax(z / T) (Guo et al., "On Calibration of Modern Neural Networks", ICML 2017).
        Probabilities have none.
    """

    kind: OutputKind = "logits"
    temperature: float = 1.0

    def read(self, output: ArrayLike) -> Prediction:
        """The answer in an output.

        Parameters
        ----------
        output:
            (N, K) numbers, or any shape (N, ...) of which one axis besides the first holds the classes and all
            others have length one, such as (N, K, 1, 1).

        Raises
        ------
        InputError
            If the shape is another one, K is below 2, or the dtype is not numeric. A row that is not a
            distribution is marked in `Prediction.valid` instead.
        """
        return Prediction.from_output(class_rows(output), self.kind, self.temperature)

    def logits(self, output: ArrayLike) -> Float32Array:
        """(N, K) float32 on a logarithmic scale, for losses that want logits: softmax of it is what `read` gives.

        Probabilities below `SMALLEST_PROBABILITY` count as that. Raises `InputError` as `read` does.
        """
        if self.kind == "logits":
            return np.asarray(class_rows(output), dtype=np.float32) / np.float32(self.temperature)
        return np.asarray(np.log(np.maximum(self.read(output).probabilities, np.float32(SMALLEST_PROBABILITY))))

    def coarse_form(self, output: ArrayLike) -> str:
        """How coarsely probabilities are written: "3 decimals", "top 5", both, or empty where no such form shows.

        Raises `InputError` as `read` does.
        """
        values = class_rows(output)
        inside = (values > 0) & (values < 1)
        if self.kind == "logits" or inside.sum() < _ENOUGH:
            return ""
        # Relative, so that the tiny probabilities of a sure service do not pass for zeros.
        whole = np.asarray(values, dtype=np.float64)
        few = [d for d in COARSE_DECIMALS if (np.abs(whole - np.round(whole, d)) <= 1e-6 * np.abs(whole)).all()]
        listed = np.bincount((whole != 0).sum(axis=1), minlength=whole.shape[1] + 1)
        k = int(listed.argmax())
        # Nearly every row has as many: digits that are left out leave zeros too, but not in such order.
        parts = [f"top {k}"] if 1 < k < whole.shape[1] and listed[k] > 0.9 * len(whole) else []
        return ", ".join(parts + [f"{d} decimals" for d in few[-1:]])

    def write(self, output: NDArray[Any], verdict: Verdict) -> NDArray[Any]:
        """The output with the corrected rows of a verdict in it, of the same shape and dtype.

        Logits become T log(max(p, `SMALLEST_PROBABILITY`)), so that softmax(z / T) gives p back.

        Raises
        ------
        InputError
            If the output does not hold floating-point numbers, or another number of rows or classes.
        """
        if output.dtype.kind != "f":
            raise InputError(f"A corrected distribution cannot be written as {output.dtype}.")
        result = output.copy()
        rows = class_rows(result)
        if rows.shape != verdict.probabilities.shape:
            raise InputError(f"A correction of shape {verdict.probabilities.shape} does not fit {output.shape}.")
        values = verdict.probabilities[verdict.corrected].astype(np.float64)
        if self.kind == "logits":
            values = self.temperature * np.log(np.maximum(values, SMALLEST_PROBABILITY))
        rows[verdict.corrected] = values
        return result


def class_rows(output: ArrayLike) -> NDArray[Any]:
    """An output (N, ...) as (N, K), sharing its memory where numpy can; see `OutputCodec.read`.

    Raises
    ------
    InputError
        If more than one axis besides the first is longer than one.
    """
    array = np.asarray(output)
    if array.dtype.kind not in "fiub":
        raise InputError(f"The class output has dtype {array.dtype}; expected numbers.")
    classes = [n for n in array.shape[1:] if n != 1]
    if array.ndim < 2 or len(classes) != 1:
        raise InputError(
            f"The class output has shape {array.shape}; expected one row of classes for each input.",
            "Name the output that holds (rows, classes).",
        )
    return array if array.ndim == 2 else array.reshape(len(array), classes[0])
