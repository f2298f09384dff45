"""The step `fides_verify`: asks the verifiers for a reference, next to the service model.

The model's `model.py` is two lines: a comment and
`from fides_plugins.serving.triton.entry import Verify as TritonPythonModel`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray

from fides_plugins.attestation.wire import COMMITMENT_PARAMETER, PARAMETER
from fides_plugins.builtin.remote import SignedRows, pack_requests
from fides_plugins.errors import FidesError
from fides_plugins.guard import Failure
from fides_plugins.pipeline import VerifyOutcome
from fides_plugins.serving.triton.decoders import make_decoder
from fides_plugins.serving.triton.step import Step, row_ids, safe_text
from fides_plugins.serving.triton.wire import pack_outcome
from fides_plugins.types import Query, Verification

logger = logging.getLogger("fides_plugins")

#: Failures that one request's rows may have caused for others in the same merged call.
_ROW_CAUSED = ("raised", "contract", "input")


_UNSIGNED = SignedRows(0)


@dataclass
class _Work:
    """One request on its way: its query, or why it has none, then its outcome."""

    request_id: str
    arrays: dict[str, NDArray[Any]]
    n_rows: int
    outcome: VerifyOutcome | None = None
    signed: SignedRows = _UNSIGNED

    @property
    def signature(self) -> tuple[Any, ...]:
        """Requests with the same signature can be verified in one call."""
        # A signed request is for its own rows and can be spent once, so it is never merged and asked again.
        return (
            self.signed.request,
            *((n, a.dtype.str, a.shape[1:], len(a) == self.n_rows) for n, a in sorted(self.arrays.items())),
        )


class TritonPythonModel:
    """Answers every request with FIDES_REFERENCES, FIDES_AVAILABLE and FIDES_VERIFICATION; never with an error."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Load settings, bundle and plug-ins."""
        self._step = Step(args)
        self._cast = np.dtype(self._step.option("cast")) if self._step.option("cast") else None
        try:
            self._decode = make_decoder(self._step.option("decode"))
        except FidesError as error:
            raise pb_utils.TritonModelException(f"fides: {self._step.name} cannot start: {error}") from None

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """One response per request; requests of equal shape are verified in one call."""
        works = [self._read(request) for request in requests]
        groups: dict[tuple[Any, ...], list[_Work]] = {}
        for work in works:
            if work.outcome is None:
                groups.setdefault(work.signature, []).append(work)
        for group in groups.values():
            self._verify(group)
        self._step.metrics.refresh()
        return [self._respond(work) for work in works]

    def finalize(self) -> None:
        """Close the plug-ins."""
        self._step.close()

    def _read(self, request: Any) -> _Work:
        work = _Work(request.request_id(), {}, 0)
        try:
            for name in self._step.input_names:
                array = self._step.array(request, name)
                if array is not None:
                    work.arrays[name] = array
            work.n_rows = self._rows(work.arrays)
            work.signed = _signed(request, work.n_rows)
            main = self._main_name(work.arrays)
            if self._decode is not None:
                work.arrays[main] = self._decode(work.arrays[main])
            elif self._cast is not None:
                work.arrays[main] = work.arrays[main].astype(self._cast)
        except Exception as error:  # host boundary: a client's tensor must not end the step or show a traceback
            logger.error("fides_verify cannot read a request", exc_info=error)
            work.outcome = _failed(error)
        return work

    def _main_name(self, arrays: Mapping[str, NDArray[Any]]) -> str:
        wanted = self._step.settings.input
        return wanted if wanted in arrays else next(iter(arrays))

    def _rows(self, arrays: Mapping[str, NDArray[Any]]) -> int:
        return len(arrays[self._main_name(arrays)]) if arrays else 0

    def _query(self, works: Sequence[_Work]) -> Query:
        n_rows = sum(w.n_rows for w in works)
        names = [n for n, a in works[0].arrays.items() if len(a) == works[0].n_rows]
        arrays = {
            n: np.concatenate([w.arrays[n] for w in works]) if len(works) > 1 else works[0].arrays[n] for n in names
        }
        ids = tuple(i for w in works for i in row_ids(w.request_id, w.n_rows))
        return self._step.query(arrays, n_rows, ids, pack_requests(w.signed for w in works))

    def _verify(self, works: Sequence[_Work]) -> None:
        outcome = self._ask(works)
        alone = len(works) == 1
        if not alone and any(f.kind in _ROW_CAUSED for f in outcome.failures):
            # One client's rows may be the cause; nobody else's rows shall suffer for them.
            for work in works:
                work.outcome = self._ask([work])
            return
        start = 0
        for work in works:
            work.outcome = outcome if alone else _rows_of(outcome, start, start + work.n_rows)
            start += work.n_rows

    def _ask(self, works: Sequence[_Work]) -> VerifyOutcome:
        try:
            if not sum(w.n_rows for w in works):
                return VerifyOutcome(None)
            return self._step.pipeline.verify(self._query(works))
        except Exception as error:  # host boundary, as above
            logger.error("fides_verify failed", exc_info=error)
            return _failed(error)

    def _respond(self, work: _Work) -> Any:
        outcome = work.outcome or VerifyOutcome(None)
        packed = pack_outcome(outcome, work.n_rows, self._step.pipeline.n_classes)
        # The row axis of a batch-less model exists between the steps only, so it is kept here.
        return pb_utils.InferenceResponse([pb_utils.Tensor(name, array) for name, array in packed.items()])


def _signed(request: Any, n_rows: int) -> SignedRows:
    """What a client asks of a verifier in an enclave, from the request's parameters."""
    parameters = json.loads(request.parameters() or "{}")
    return SignedRows(n_rows, str(parameters.get(PARAMETER, "")), str(parameters.get(COMMITMENT_PARAMETER, "")))


def _failed(error: Exception) -> VerifyOutcome:
    return VerifyOutcome(None, (Failure("triton", "fides_verify", "input", safe_text(error)),))


def _rows_of(outcome: VerifyOutcome, start: int, stop: int) -> VerifyOutcome:
    whole = outcome.verification
    if whole is None:
        return outcome
    part = Verification(whole.references[start:stop], whole.available[start:stop], whole.sources, whole.evidence)
    return VerifyOutcome(part, outcome.failures)
