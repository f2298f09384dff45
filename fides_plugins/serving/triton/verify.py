"""The step `fides_verify`: asks the verifiers for a reference, next to the service model.

The model's `model.py` is two lines: a comment and
`from fides_plugins.serving.triton.entry import Verify as TritonPythonModel`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from fides_plugins.attestation.wire import COMMITMENT_PARAMETER, PARAMETER
from fides_plugins.errors import FidesError
from fides_plugins.pipeline import VerifyOutcome
from fides_plugins.protection import unverified
from fides_plugins.serving.triton.decoders import make_decoder
from fides_plugins.serving.triton.step import Step, row_ids
from fides_plugins.serving.triton.wire import pack_outcome
from fides_plugins.types import Query, SignedRows

logger = logging.getLogger("fides_plugins")


class TritonPythonModel(Step):
    """Answers every request with FIDES_REFERENCES, FIDES_AVAILABLE and FIDES_VERIFICATION; never with an error."""

    def __init__(self, args: Mapping[str, str]) -> None:
        super().__init__(args)
        self._cast = np.dtype(self.option("cast")) if self.option("cast") else None
        try:
            self._decode = make_decoder(self.option("decode"))
        except FidesError as error:
            raise self.cannot_start(error) from None

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """One response per request; requests of equal shape are verified in one call."""
        read = [self._read(request) for request in requests]
        verified = iter(self.protection.verify_many([q for q, _ in read if isinstance(q, Query)]))
        return [self._respond(next(verified) if isinstance(q, Query) else q, n_rows) for q, n_rows in read]

    def _read(self, request: Any) -> tuple[Query | VerifyOutcome, int]:
        """The query, or what became of it, and its number of rows."""
        n_rows = 0
        try:
            arrays = self.arrays(request, self.input_names)
            wanted = self.settings.input
            main = wanted if wanted in arrays else next(iter(arrays))
            n_rows = len(arrays[main])
            if self._decode is not None:
                arrays[main] = self._decode(arrays[main])
            elif self._cast is not None:
                arrays[main] = arrays[main].astype(self._cast)
            ids = row_ids(request.request_id(), n_rows)
            return self.protection.query(arrays, n_rows, ids, [_signed(request, n_rows)]), n_rows
        except Exception as error:  # host boundary: a client's tensor must not end the step or show a traceback
            logger.error("fides_verify cannot read a request", exc_info=error)
            return unverified(error, "triton"), n_rows

    def _respond(self, outcome: VerifyOutcome, n_rows: int) -> Any:
        packed = pack_outcome(outcome, n_rows, len(self.protection.class_names))
        # The row axis of a batch-less model exists between the steps only, so it is kept here.
        return pb_utils.InferenceResponse([pb_utils.Tensor(name, array) for name, array in packed.items()])


def _signed(request: Any, n_rows: int) -> SignedRows:
    """What a client asks of a verifier in an enclave, from the request's parameters."""
    parameters = json.loads(request.parameters() or "{}")
    return SignedRows(n_rows, str(parameters.get(PARAMETER, "")), str(parameters.get(COMMITMENT_PARAMETER, "")))
