"""The base of every teacher: a service model whose answers a verification model learns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fides_plugins.bundle import InputSpec
from fides_plugins.codec import class_rows
from fides_plugins.errors import InputError, TrainingError
from fides_plugins.training.costs import Cost
from fides_plugins.types import Float32Array

#: Rows per request and per cached file.
CHUNK_ROWS = 128


class Teacher(ABC):
    """A service model that can be asked.

    Attributes
    ----------
    name:
        For provenance; holds no path.
    digest:
        Identifies the model: teachers with the same digest give the same answers.
    input:
        What it takes, or None where only the data can tell.
    input_name:
        Of its input, where `input` is None.
    batch:
        The most rows that it is asked about at once.
    """

    name: str
    digest: str
    input: InputSpec | None = None
    input_name: str = "input"
    batch: int = CHUNK_ROWS

    def ask(self, images: NDArray[Any], on_rows: Callable[[int], None] = lambda done: None) -> Float32Array:
        """The raw class output (n, K) for rows (n, ...).

        Parameters
        ----------
        on_rows:
            Called with the number of rows done so far.

        Raises
        ------
        TrainingError
            If the model does not answer, or not with one row of classes for each image.
        """
        parts = []
        for start in range(0, len(images), self.batch):
            rows = np.ascontiguousarray(images[start : start + self.batch])
            parts.append(class_matrix(self.answer(rows), len(rows), self.name))
            on_rows(start + len(rows))
        if len({p.shape[1] for p in parts}) > 1:
            raise TrainingError(f"{self.name} answers with different numbers of classes.", "Let it give all classes.")
        return np.concatenate(parts)

    @abstractmethod
    def answer(self, rows: NDArray[Any]) -> NDArray[Any]:
        """The class output for at most `batch` rows, in any shape that `codec.class_rows` takes; raises as `ask`."""

    def cost(self, images: NDArray[Any]) -> Cost | None:
        """Parameters and multiply-adds for one row; None where the model cannot be looked into."""
        return None

    def close(self) -> None:  # noqa: B027 - most teachers hold nothing open
        """Let go of connections."""


def pick_tensor(tensors: Sequence[Any], name: str, what: str, model: str, prefer_rank: int | None = None) -> Any:
    """The input or output called `name`; without a name, the only one there is, or the only one of that rank.

    Raises
    ------
    TrainingError
        If none has the name, or several could be meant.
    """
    names = [t.name for t in tensors]
    if name:
        if name not in names:
            raise TrainingError(f"{model} has no {what} {name!r}; it has {names}.")
        return tensors[names.index(name)]
    likely = [t for t in tensors if len(t.shape) == prefer_rank] or tensors
    if len(likely) != 1:
        raise TrainingError(f"{model} has the {what}s {names}.", f"Name the one that matters with --{what}-name.")
    return likely[0]


def class_matrix(output: NDArray[Any], n: int, name: str) -> Float32Array:
    """The answer to `n` rows, of any shape that `codec.class_rows` takes, as (n, K) float32.

    Raises
    ------
    TrainingError
        If it has another shape, or is not finite.
    """
    try:
        array = np.asarray(class_rows(output), dtype=np.float32)
    except InputError as error:
        raise TrainingError(f"{name}: {error.cause_text}", error.remedy) from None
    if len(array) != n:
        raise TrainingError(f"{name} answered {n} images with {len(array)} rows.", "Name the output of the classes.")
    if not np.isfinite(array).all():
        raise TrainingError(f"{name} answered with NaN or infinity.", "Check the scale of the images.")
    return array
