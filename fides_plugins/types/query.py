"""What a client asked: the inputs of N rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fides_plugins.errors import InputError
from fides_plugins.types.arrays import EMPTY, frozen, set_field

#: Name of the row-only tensor of a query whose inputs the host does not have.
ROWS_ONLY = "FIDES_ROWS"


@dataclass(frozen=True, eq=False)
class Query:
    """One batch of requests, as the service model sees it.

    Attributes
    ----------
    inputs:
        Name to tensor; the first axis of every tensor is the row (N). Read-only.
    request_ids:
        One string per row, or empty when the host knows none.
    model_name:
        Name under which the service model is served.
    metadata:
        Host-specific strings (server, version). Never used for a decision by the built-ins.
    """

    inputs: Mapping[str, NDArray[Any]]
    request_ids: tuple[str, ...] = ()
    model_name: str = ""
    metadata: Mapping[str, str] = field(default_factory=lambda: EMPTY)

    def __post_init__(self) -> None:
        if not self.inputs:
            raise InputError("A query has no input tensor.", "Give at least one named tensor.")
        arrays: dict[str, NDArray[Any]] = {}
        for name, value in self.inputs.items():
            array = np.asarray(value)
            if array.ndim == 0:
                raise InputError(f"Input {name!r} is a scalar; the first axis must be the row.")
            arrays[name] = frozen(array)
        lengths = {name: a.shape[0] for name, a in arrays.items()}
        if len(set(lengths.values())) > 1:
            raise InputError(f"Inputs disagree on the number of rows: {lengths}.")
        set_field(self, "inputs", MappingProxyType(arrays))
        set_field(self, "metadata", MappingProxyType(dict(self.metadata)))
        if self.request_ids and len(self.request_ids) != self.n_rows:
            raise InputError(f"{len(self.request_ids)} request ids for {self.n_rows} rows.")

    @classmethod
    def without_inputs(
        cls,
        n_rows: int,
        request_ids: tuple[str, ...] = (),
        model_name: str = "",
        metadata: Mapping[str, str] = EMPTY,
    ) -> Query:
        """A query of N rows whose inputs the host does not have: its one tensor is empty, (N, 0)."""
        return cls({ROWS_ONLY: np.empty((n_rows, 0), dtype=np.float32)}, request_ids, model_name, metadata)

    @property
    def n_rows(self) -> int:
        """N, the number of rows."""
        return int(next(iter(self.inputs.values())).shape[0])

    def tensor(self, name: str = "") -> NDArray[Any]:
        """The input called `name`; the only input when there is just one and the name is unknown.

        Raises
        ------
        InputError
            If there are several inputs and none has that name.
        """
        if name in self.inputs:
            return self.inputs[name]
        if len(self.inputs) == 1:
            return next(iter(self.inputs.values()))
        raise InputError(
            f"The query has inputs {sorted(self.inputs)}, none is called {name!r}.",
            "Set `input` to the name of the tensor that the verification model takes.",
        )
