"""What a client asked: the inputs of N rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fides_plugins.errors import InputError
from fides_plugins.types.arrays import EMPTY, Rows, frozen, set_field

#: Name of the row-only tensor, (N, 0), of a query whose inputs the host does not have.
ROWS_ONLY = "FIDES_ROWS"
#: Characters of a request id.
MAX_ID = 128
_KEPT_END = 32


def printable_id(given: object) -> str:
    """A request id as it leaves us, in logs, records and answers: printable ASCII, at most `MAX_ID` characters.

    Clients choose their ids. Anything else is escaped, so that different ids stay different, and a long one
    loses its middle, so that the row's number at the end stays.
    """
    text = str(given)
    long = len(text) > MAX_ID
    if long:
        text = text[:MAX_ID] + text[-_KEPT_END:]
    if not (text.isascii() and text.isprintable()):
        text = text.encode("unicode_escape").decode("ascii")
    if long or len(text) > MAX_ID:
        text = f"{text[: MAX_ID - _KEPT_END - 3]}...{text[-_KEPT_END:]}"
    return text


@dataclass(frozen=True)
class SignedRows:
    """A client's signed request for the next rows of a batch; without text, rows without a signed request.

    For a verifier in an enclave, which answers signed requests only. `commitment` is the host's digest of the
    service's output, in the scheme of that name; see docs/explanation/threat-model.md.
    """

    n_rows: int
    request: str = ""
    commitment: str = ""


@dataclass(frozen=True, eq=False)
class Query:
    """One batch of requests, as the service model sees it.

    Attributes
    ----------
    inputs:
        Name to tensor; the first axis of every tensor is the row (N). Read-only.
    request_ids:
        One string per row, or empty when the host knows none. Printable ASCII, whatever a client sent.
    model_name:
        Name under which the service model is served.
    metadata:
        Host-specific strings (server, version). Never used for a decision by the built-ins.
    signed:
        The signed requests that the rows belong to, in their order; empty where no client signed one. A
        request covers its rows together, so `rows` leaves them behind.
    """

    inputs: Mapping[str, NDArray[Any]]
    request_ids: tuple[str, ...] = ()
    model_name: str = ""
    metadata: Mapping[str, str] = field(default_factory=lambda: EMPTY)
    signed: tuple[SignedRows, ...] = ()

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
        set_field(self, "request_ids", tuple(printable_id(i) for i in self.request_ids))
        if self.request_ids and len(self.request_ids) != self.n_rows:
            raise InputError(f"{len(self.request_ids)} request ids for {self.n_rows} rows.")
        set_field(self, "signed", tuple(self.signed) if any(part.request for part in self.signed) else ())
        if self.signed and sum(part.n_rows for part in self.signed) != self.n_rows:
            raise InputError(f"Signed requests of {sum(p.n_rows for p in self.signed)} rows for {self.n_rows} rows.")

    @classmethod
    def concat(cls, parts: Sequence[Query]) -> Query:
        """The rows of several queries, in order; model and metadata are the first one's.

        Raises
        ------
        InputError
            If the queries do not hold the same tensors, with rows of the same shape.
        """
        first = parts[0]
        if len(parts) == 1:
            return first
        if any(p.inputs.keys() != first.inputs.keys() for p in parts):
            raise InputError("Queries of different inputs cannot be put together.")
        try:
            inputs = {name: np.concatenate([p.inputs[name] for p in parts]) for name in first.inputs}
        except ValueError:
            raise InputError("Queries whose rows have different shapes cannot be put together.") from None
        named = all(p.request_ids for p in parts if p.n_rows)
        signed: list[SignedRows] = []
        if any(p.signed for p in parts):
            for part in parts:
                signed += part.signed or (SignedRows(part.n_rows),)
        ids = tuple(i for p in parts for i in p.request_ids) if named else ()
        return cls(inputs, ids, first.model_name, first.metadata, tuple(signed))

    def rows(self, index: Rows) -> Query:
        """Some of the rows. Signed requests, which cover their rows together, do not come along."""
        ids = tuple(np.asarray(self.request_ids)[index].tolist()) if self.request_ids else ()
        return Query({n: a[index] for n, a in self.inputs.items()}, ids, self.model_name, self.metadata)

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
