"""The step `fides_validate`: judges the service's class output and answers in its place.

The model's `model.py` is two lines: a comment and
`from fides_plugins.serving.triton.entry import Validate as TritonPythonModel`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray

from fides_plugins.builtin.remote import receipts_of
from fides_plugins.guard import Failure
from fides_plugins.pipeline import VerifyOutcome
from fides_plugins.protection import Claim, safe_text
from fides_plugins.serving.triton import wire
from fides_plugins.serving.triton.step import Step, refusal, row_ids
from fides_plugins.types import Status, Verdict

logger = logging.getLogger("fides_plugins")

#: What a step without the verification's tensors judges with: `fides_fallback`, which stands in while another one is
#: dead (docs/explanation/triton-failure.md).
_NOBODY_VERIFIED = VerifyOutcome(None, (Failure("triton", "fides_verify", "open"),))

#: Where in a verdict each tensor with one value per row comes from.
_COLUMNS = {
    wire.STATUS: "status_text",
    wire.SCORE: "score",
    wire.P_VALUE: "p_value",
    wire.LABEL: "label",
    wire.REASON: "reason",
}


@dataclass(frozen=True)
class _Work:
    """One request: what was read of it, or why it could not be."""

    output: NDArray[Any] | None
    part: Claim | None = None
    problem: str = ""
    ids: tuple[str, ...] = ()

    @property
    def n_rows(self) -> int:
        return len(self.output) if self.output is not None and self.output.ndim else 0


class TritonPythonModel(Step):
    """Gives the class output (the service's tensor, or corrected rows) and, where asked, the verdict."""

    def __init__(self, args: Mapping[str, str]) -> None:
        # The stand-in for dead steps judges nothing: its gauges would only overwrite those of the real one.
        super().__init__(args, alarm=wire.REFERENCES in args["model_config"])
        inputs = [n for n in self.input_names if n not in wire.INTERNAL]
        outputs = {o["name"]: o for o in self.config.get("output", [])}
        shared = [n for n in outputs if n not in wire.VERDICT_TYPES]
        name = self.settings.output or (shared[0] if len(shared) == 1 else "")
        if name not in inputs or name not in outputs:
            what = f"it needs its class output {name!r} among its inputs and its outputs"
            raise self.cannot_start(f"{what}; set the parameter fides.output to its name.")
        self._output = name
        self._query_inputs = tuple(n for n in inputs if n != name)
        self._verified = set(wire.INTERNAL) <= set(self.input_names)

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """One response per request: an answer, or the refusal of that request."""
        works = [self._read(request) for request in requests]
        judged = iter(self.protection.judge_many([w.part for w in works if w.part is not None]))
        return [
            self._answer(request, work, None if work.part is None else next(judged))
            for request, work in zip(requests, works, strict=True)
        ]

    def _read(self, request: Any) -> _Work:
        output: NDArray[Any] | None = None
        ids: tuple[str, ...] = ()
        try:
            output = self.array(request, self._output)
            if output is None:
                return _Work(None, problem="the service gave no class output")
            n_rows = len(output) if output.ndim else 0
            ids = row_ids(request.request_id(), n_rows)
            outcome, probe = _NOBODY_VERIFIED, False
            if self._verified:
                # These tensors always have the row axis, so they are taken as they are.
                parts = [pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in wire.INTERNAL]
                outcome, probe = wire.unpack_outcome(*parts), wire.is_probe(parts[-1])
            query = self.protection.query(self.arrays(request, self._query_inputs), n_rows, ids)
            return _Work(output, Claim(query, output, outcome, probe))
        except Exception as error:  # host boundary: the row is an error, and policy decides what that means
            logger.error("fides_validate cannot read a request", exc_info=error)
            return _Work(output, problem=safe_text(error), ids=ids)

    def _answer(self, request: Any, work: _Work, verdict: Verdict | None) -> Any:
        if work.output is None:
            return refusal(work.problem, attacked=False)
        protection = self.protection
        try:
            return self._respond(request, work, verdict or protection.unjudged(work.n_rows, work.problem, work.ids))
        except Exception as error:  # host boundary: nothing may end the step or show a traceback to a client
            logger.error("fides_validate failed", exc_info=error)
            return self._respond(request, work, protection.unjudged(work.n_rows, safe_text(error), work.ids))

    def _respond(self, request: Any, work: _Work, verdict: Verdict) -> Any:
        assert work.output is not None  # `_answer` refused the others
        output, verdict = self.protection.correct(work.output, verdict)
        if verdict.refused.any():
            return _refuse(verdict)
        wanted = set(request.requested_output_names())
        tensors = [self.tensor(self._output, output)] if self._output in wanted else []
        receipt = receipts_of(work.part.outcome.verification, 1)[0] if work.part is not None else ""
        tensors += [self._verdict_tensor(name, verdict, receipt) for name in wire.VERDICT_TYPES if name in wanted]
        return pb_utils.InferenceResponse(tensors)

    def _verdict_tensor(self, name: str, verdict: Verdict, receipt: str) -> Any:
        if name == wire.PROBABILITIES:
            return self.tensor(name, verdict.probabilities)
        if name == wire.RECEIPT:
            column: NDArray[Any] = np.array([receipt, *[""] * (verdict.n_rows - 1)][: verdict.n_rows])
        else:
            # Only what was asked for is computed: text columns cost more than numbers.
            column = getattr(verdict, _COLUMNS[name])
        text = wire.VERDICT_TYPES[name] == "BYTES"
        return self.tensor(name, column.astype(np.object_) if text else column, per_row=True)


def _refuse(verdict: Verdict) -> Any:
    rows = np.flatnonzero(verdict.refused)
    attacked = bool((verdict.status[rows] == Status.ATTACKED).any())
    first = rows[np.argmax(verdict.status[rows] == Status.ATTACKED)] if attacked else rows[0]
    listed = ", ".join(map(str, rows[:20].tolist())) + (", ..." if len(rows) > 20 else "")
    return refusal(
        f"{verdict.status_text[first]}: refused {len(rows)} of {verdict.n_rows} row(s) ({listed}): "
        f"{verdict.reason[first]}",
        attacked,
    )
