"""What every teacher is: a service model whose answers a verification model learns."""

from __future__ import annotations

from abc import ABC, abstractmethod
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
        Stands for the model: the same digest, the same answers.
    input:
        What it takes, or None where only the data can tell.
    """

    name: str
    digest: str
    input: InputSpec | None = None

    @abstractmethod
    def ask(self, images: NDArray[Any]) -> Float32Array:
        """The raw class output (n, K) for a few rows (n, ...).

        Raises
        ------
        TrainingError
            If the model does not answer, or not with one row of classes for each image.
        """

    def cost(self, images: NDArray[Any]) -> Cost | None:
        """Parameters and multiply-adds for one row; None where the model cannot be looked into."""
        return None

    def close(self) -> None:  # noqa: B027 - most teachers hold nothing open
        """Let go of connections."""


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
