"""The step `fides_validate`: judges the service's class output and answers in its place.

The model's `model.py` is two lines: a comment and
`from fides_plugins.serving.triton.entry import Validate as TritonPythonModel`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray

from fides_plugins.builtin.remote import receipts_of
from fides_plugins.guard import Failure
from fides_plugins.pipeline import VerifyOutcome
from fides_plugins.serving.triton import wire
from fides_plugins.serving.triton.step import Step, refusal, row_ids, safe_text
from fides_plugins.types import OutputKind, Prediction, Query, Status, Verdict, Verification

logger = logging.getLogger("fides_plugins")

#: Smallest probability written as a logit; a corrected row must stay finite in float16 too.
_FLOOR = 1e-6


@dataclass
class _Work:
    """One request on its way: what was read of it, or why it could not be, then its verdict."""

    request: Any
    output: NDArray[Any] | None = None
    n_rows: int = 0
    ids: tuple[str, ...] = ()
    service: Prediction | None = None
    outcome: VerifyOutcome | None = None
    probe: bool = False
    problem: str = ""
    verdict: Verdict | None = None


class TritonPythonModel:
    """Gives the class output (the service's tensor, or corrected rows) and, where asked, the verdict."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Load settings, bundle and plug-ins."""
        # The stand-in for dead steps judges nothing: its gauges would only overwrite those of the real one.
        self._step = Step(args, alarm=wire.REFERENCES in args["model_config"])
        settings, bundle = self._step.settings, self._step.pipeline.bundle
        inputs = [n for n in self._step.input_names if n not in wire.INTERNAL]
        outputs = {o["name"]: o for o in self._step.config.get("output", [])}
        shared = [n for n in outputs if n not in wire.VERDICT_TYPES]
        name = settings.output or (shared[0] if len(shared) == 1 else "")
        if name not in inputs or name not in outputs:
            raise pb_utils.TritonModelException(
                f"fides: {self._step.name} needs its class output {name!r} among its inputs and its outputs; "
                "set the parameter fides.output to its name."
            )
        self._output = name
        self._query_inputs = [n for n in inputs if n != name]
        # A step without the verification's tensors stands in while a step is dead: it marks or refuses.
        self._verified = set(wire.INTERNAL) <= set(self._step.input_names)
        spec = bundle.manifest.service if bundle is not None else None
        self._kind: OutputKind = settings.output_kind or (spec.output_kind if spec is not None else "logits")
        self._temperature = spec.temperature if spec is not None else 1.0

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """One response per request: an answer, or the refusal of that request."""
        works = [self._read(request) for request in requests]
        groups: dict[Any, list[_Work]] = {}
        for index, work in enumerate(works):
            groups.setdefault(self._signature(work) or index, []).append(work)
        for group in groups.values():
            if len(group) > 1:
                self._judge_together(group)
        return [self._answer(work) for work in works]

    def finalize(self) -> None:
        """Close the plug-ins."""
        self._step.close()

    def _read(self, request: Any) -> _Work:
        work = _Work(request)
        try:
            work.output = self._step.array(request, self._output)
            if work.output is None:
                return work
            work.n_rows = len(work.output) if work.output.ndim else 0
            work.ids = row_ids(request.request_id(), work.n_rows)
            # A trailing (K, 1, 1) or a leading (1, K) inside the row is the same distribution.
            flat = work.output.reshape(work.n_rows, -1)
            work.service = Prediction.from_output(flat, self._kind, self._temperature)
            if self._verified:
                # What travels between the steps always has the row axis, so it is taken as it is.
                parts = [pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in wire.INTERNAL]
                work.outcome, work.probe = wire.unpack_outcome(*parts), wire.is_probe(parts[-1])
            else:
                work.outcome = VerifyOutcome(None, (Failure("triton", "fides_verify", "open"),))
        except Exception as error:  # host boundary: the row is an error, and policy decides what that means
            logger.error("fides_validate cannot read a request", exc_info=error)
            work.problem = safe_text(error)
        return work

    def _signature(self, work: _Work) -> Any:
        """What requests must have in common to be judged in one call; None for one that is judged alone.

        Where the inputs are handed on, or a verifier shows evidence or failed, every request is its own.
        """
        if work.problem or work.service is None or work.outcome is None or work.probe or self._query_inputs:
            return None
        verification = work.outcome.verification
        if verification is None or work.outcome.failures or any(verification.evidence):
            return None
        rows, verifiers, classes = verification.references.shape
        if work.service.probabilities.shape != (rows, classes):
            return None
        return verifiers, classes, verification.sources

    def _judge_together(self, works: Sequence[_Work]) -> None:
        """One verdict for several requests: a call costs much the same for one row and for many.

        If a plug-in fails, one client's rows may be the cause; each request is then judged alone.
        """
        pipeline = self._step.pipeline
        try:
            n_rows = sum(w.n_rows for w in works)
            query = self._step.query({}, n_rows, tuple(i for w in works for i in w.ids))
            verdict, failed = self._try_together(query, works)
            if failed:
                return
            pipeline.record(query, verdict)
            self._step.metrics.observe_verdict(verdict, query.request_ids)
        except Exception as error:  # host boundary: what cannot be judged together is judged one by one
            logger.error("fides_validate cannot judge requests together", exc_info=error)
            return
        start = 0
        for work in works:
            work.verdict = _rows_of(verdict, start, start + work.n_rows)
            start += work.n_rows

    def _try_together(self, query: Query, works: Sequence[_Work]) -> tuple[Verdict, bool]:
        services = [w.service for w in works if w.service is not None]
        found = [w.outcome.verification for w in works if w.outcome is not None]
        parts = [v for v in found if v is not None]
        service = Prediction(
            np.concatenate([s.probabilities for s in services]), np.concatenate([s.valid for s in services])
        )
        verification = Verification(
            np.concatenate([v.references for v in parts]),
            np.concatenate([v.available for v in parts]),
            parts[0].sources,
        )
        errors = self._step.pipeline.plugin_errors
        before = sum(errors.values())
        verdict = self._step.pipeline.validate(query, service, VerifyOutcome(verification), record=False)
        return verdict, sum(errors.values()) > before

    def _answer(self, work: _Work) -> Any:
        if work.output is None:
            return refusal(work.problem or "the service gave no class output", attacked=False)
        try:
            receipt = ""
            if work.verdict is None:
                work.verdict, receipt = self._judge(work)
            return self._respond(work.request, work.output, work.verdict, receipt)
        except Exception as error:  # host boundary: nothing may end the step or show a traceback to a client
            logger.error("fides_validate failed", exc_info=error)
            return self._without_verdict(work.request, work.output, safe_text(error))

    def _judge(self, work: _Work) -> tuple[Verdict, str]:
        arrays = {n: a for n in self._query_inputs if (a := self._step.array(work.request, n)) is not None}
        query = self._step.query(arrays, work.n_rows, work.ids)
        receipt = ""
        if work.problem or work.service is None or work.outcome is None:
            verdict = self._step.pipeline.fail(query, work.n_rows, work.problem)
        else:
            verdict = self._step.pipeline.validate(query, work.service, work.outcome, record=not work.probe)
            (receipt,) = receipts_of(work.outcome.verification, 1)
        if not work.probe:
            self._step.metrics.observe_verdict(verdict, query.request_ids)
        return verdict, receipt

    def _without_verdict(self, request: Any, output: NDArray[Any] | None, reason: str) -> Any:
        """Our own failure: on_error decides, as for any other."""
        settings = self._step.settings
        if output is None or (settings.on_error == "closed" and settings.mode != "observe"):
            return refusal(f"validation failed: {reason}", attacked=False)
        n_rows = len(output) if output.ndim else 0
        query = self._step.query({}, n_rows)
        return self._respond(request, output, self._step.pipeline.fail(query, n_rows, reason))

    def _respond(self, request: Any, output: NDArray[Any], verdict: Verdict, receipt: str = "") -> Any:
        if verdict.refused.any():
            return _refuse(verdict)
        if self._step.settings.mode == "correct" and verdict.corrected.any():
            output = self._corrected(output, verdict)
        wanted = set(request.requested_output_names())
        tensors = []
        if self._output in wanted:
            tensors.append(self._step.tensor(self._output, output))
        tensors += [self._verdict_tensor(name, verdict, receipt) for name in wire.VERDICT_TYPES if name in wanted]
        return pb_utils.InferenceResponse(tensors)

    def _corrected(self, output: NDArray[Any], verdict: Verdict) -> NDArray[Any]:
        """The service's tensor with the attacked rows replaced, of the same kind, dtype and shape."""
        rows = verdict.corrected
        values = verdict.probabilities[rows]
        if self._kind == "logits":
            # softmax(z / T) gives the probabilities back, so the client's own softmax sees the same sharpness.
            values = np.log(np.maximum(values, _FLOOR)) * self._temperature
        result = np.array(output)
        result[rows] = values.reshape(result[rows].shape).astype(result.dtype)
        return result

    def _verdict_tensor(self, name: str, verdict: Verdict, receipt: str) -> Any:
        if name == wire.PROBABILITIES:
            return self._step.tensor(name, verdict.probabilities)
        # Only what was asked for is computed: text columns cost more than numbers.
        column: NDArray[Any]
        if name == wire.STATUS:
            column = verdict.status_text.astype(np.object_)
        elif name == wire.REASON:
            column = verdict.reason.astype(np.object_)
        elif name == wire.RECEIPT:
            column = np.array([receipt, *[""] * (verdict.n_rows - 1)][: verdict.n_rows], dtype=np.object_)
        elif name == wire.LABEL:
            column = verdict.label
        else:
            column = verdict.score if name == wire.SCORE else verdict.p_value
        return self._step.tensor(name, column, per_row=True)


def _rows_of(verdict: Verdict, start: int, stop: int) -> Verdict:
    columns = {f.name: getattr(verdict, f.name)[start:stop] for f in fields(verdict) if f.name != "reasons"}
    return replace(verdict, **columns)


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
