"""Between a handler's `inference()` and the pipeline: verify while it runs, then judge what it returned.

Nothing here raises: what goes wrong on Fides' side becomes rows with the status `error`, which policy
passes or refuses.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fides_plugins.errors import BundleError, FidesError
from fides_plugins.observation.metrics import MetricsBackend, MetricsRecorder
from fides_plugins.pipeline import Pipeline, VerifyOutcome
from fides_plugins.policy import exempt_verdict, failed_verdict
from fides_plugins.serving.torchserve.receipts import Receipts
from fides_plugins.serving.torchserve.tensors import ClassOutput, query_inputs
from fides_plugins.serving.torchserve.verdicts import RowVerdict, rows_of
from fides_plugins.settings import Settings
from fides_plugins.types import OutputKind, Prediction, Query, Verdict

logger = logging.getLogger("fides_plugins")

#: Names a tensor that neither the settings nor the bundle name.
DEFAULT_INPUT = "input"
#: Micro-batching may run several `inference()` at once; more than this many wait for each other.
_VERIFY_THREADS = 4
METRICS_PLUGIN = "torchserve-metrics"
_METADATA = {"server": "torchserve"}
INTERNAL = "internal error of the protection; the server's log has it"


@dataclass
class Pending:
    """A verification under way."""

    query: Query | None
    outcome: Callable[[], VerifyOutcome] | None
    problem: str = ""


class Judge:
    """The pipeline of one worker, or the reason why there is none.

    Parameters
    ----------
    settings:
        With an absolute path of the bundle.
    model_name:
        Name under which TorchServe serves the model.
    concurrent:
        Verify in a thread while `inference()` runs, where the worker has more than one core.
    metrics:
        Where metrics go; None for none.

    Raises
    ------
    SettingsError, PluginError
        If settings contradict the bundle, or a required plug-in cannot be loaded. A bundle that is
        missing or was changed does not stop the server: every row becomes `error`.
    """

    def __init__(
        self, settings: Settings, model_name: str, concurrent: bool = True, metrics: MetricsBackend | None = None
    ) -> None:
        self.settings = settings
        self.model_name = settings.service_name or model_name
        self.start_problem = ""
        self.pipeline: Pipeline | None = None
        self._recorder = MetricsRecorder(metrics, self.model_name) if metrics is not None else None
        try:
            extra = {} if self._recorder is None else {METRICS_PLUGIN: self._recorder}
            self.pipeline = Pipeline.from_settings(settings, extra=extra)
            if self._recorder is not None:
                self._recorder.attach(self.pipeline)
        except BundleError as error:
            self.start_problem = error.cause_text
            logger.critical("The protection of %r is down: %s", model_name, error)
        manifest = self.pipeline.bundle.manifest if self.pipeline and self.pipeline.bundle else None
        declared = manifest.input if manifest else None
        self._input_name = settings.input or (declared.name if declared else "") or DEFAULT_INPUT
        self._input_rank = len(declared.shape) if declared else None
        self.output_kind: OutputKind = settings.output_kind or (manifest.service.output_kind if manifest else "logits")
        self._temperature = manifest.service.temperature if manifest else 1.0
        parallel = concurrent and len(os.sched_getaffinity(0)) > 1
        self._threads = ThreadPoolExecutor(_VERIFY_THREADS, "fides-verify") if parallel else None

    @property
    def class_names(self) -> tuple[str, ...]:
        """Class names by label; empty without a bundle."""
        return self.pipeline.bundle.class_names if self.pipeline and self.pipeline.bundle else ()

    def failed(self, reason: str) -> RowVerdict:
        """Verdict of a request for which there is no row to judge."""
        return rows_of(failed_verdict(self.settings, 1, len(self.class_names), reason))[0]

    def begin(self, data: Any, request_ids: Sequence[str] = (), receipts: Receipts | None = None) -> Pending:
        """Start the verification of what `inference()` gets."""
        if self.pipeline is None:
            return Pending(None, None, self.start_problem)
        try:
            inputs = query_inputs(data, self._input_name, self._input_rank)
            return self.begin_inputs(inputs, request_ids, receipts)
        except FidesError as error:
            return Pending(None, None, error.cause_text)
        except Exception:  # host boundary: whatever a handler passes around, its own inference() must still run
            logger.exception("cannot read the input of inference()")
            return Pending(None, None, INTERNAL)

    def begin_inputs(
        self, inputs: Mapping[str, NDArray[Any]], request_ids: Sequence[str] = (), receipts: Receipts | None = None
    ) -> Pending:
        """Start the verification of named arrays, (N, ...) each. Raises `InputError` if they do not fit."""
        if self.pipeline is None:
            return Pending(None, None, self.start_problem)
        query = Query(inputs, (), self.model_name, _METADATA)
        if len(request_ids) == query.n_rows:
            query = replace(query, request_ids=tuple(request_ids))
        if receipts is not None:
            query = replace(query, metadata={**query.metadata, **receipts.metadata(query.n_rows)})
        if self._threads is None:
            outcome = self.pipeline.verify(query)
            return Pending(query, lambda: outcome)
        future: Future[VerifyOutcome] = self._threads.submit(self.pipeline.verify, query)
        return Pending(query, future.result)

    def judge(self, pending: Pending, output: Any) -> tuple[list[RowVerdict], Any]:
        """Verdict per row, and what `inference()` should return.

        Where neither input nor output can be read the list is empty, and `pending.problem` says why.
        """
        try:
            verdict, found = self._verdict(pending, output)
            rows = rows_of(verdict)
        except Exception:  # host boundary: the service's answer is there and must reach policy, marked
            logger.exception("the protection failed")
            n_rows = pending.query.n_rows if pending.query else 0
            return [self.failed(INTERNAL)] * n_rows, output
        if self.settings.mode != "correct" or found is None or not verdict.corrected.any():
            return rows, output
        try:
            where = np.flatnonzero(verdict.corrected)
            return rows, found.replaced(where, verdict.probabilities[where], self.output_kind)
        except Exception:  # host boundary: an output of a strange type; the rows are attacked and uncorrected
            logger.exception("a correction cannot be written back")
            return [self._uncorrected(r) if r.corrected else r for r in rows], output

    def validate_array(self, pending: Pending, array: NDArray[Any]) -> Verdict:
        """Verdict for a class output (N, K) that the caller has extracted."""
        if self.pipeline is None or pending.query is None or pending.outcome is None:
            return self._fail(pending, len(array), pending.problem or INTERNAL)
        service = Prediction.from_output(array, self.output_kind, self._temperature)
        return self.pipeline.validate(pending.query, service, pending.outcome())

    def record_unjudged(
        self, n_rows: int, reason: str, request_ids: Sequence[str] = (), *, exempt: bool = False
    ) -> list[RowVerdict]:
        """Verdicts of rows that never reached the pipeline, shown to its observers: metrics and logs hide nothing.

        Parameters
        ----------
        exempt:
            There is no class output to verify, so that the rows are `indeterminate` and always pass.
        """
        make = exempt_verdict if exempt else failed_verdict
        verdict = make(self.settings, n_rows, len(self.class_names), reason)
        if self.pipeline is not None:
            query = Query.without_inputs(n_rows, tuple(request_ids), self.model_name, _METADATA)
            self.pipeline.record(query, verdict)
        elif self._recorder is not None:
            self._recorder.observe_verdict(verdict, request_ids)
        return rows_of(verdict)

    def close(self) -> None:
        """Stop the threads and tell the plug-ins."""
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)
        if self.pipeline is not None:
            self.pipeline.close()

    def _verdict(self, pending: Pending, output: Any) -> tuple[Verdict, ClassOutput | None]:
        try:
            found = ClassOutput.find(output, self.settings.output)
            return self.validate_array(pending, found.array), found
        except FidesError as error:
            pending.problem = pending.problem or error.cause_text
            n_rows = pending.query.n_rows if pending.query else 0
            return self._fail(pending, n_rows, error.cause_text), None

    def _fail(self, pending: Pending, n_rows: int, reason: str) -> Verdict:
        if self.pipeline is not None and pending.query is not None:
            return self.pipeline.fail(pending.query, n_rows, reason)
        self.record_unjudged(n_rows, reason)
        return failed_verdict(self.settings, n_rows, len(self.class_names), reason)

    def _uncorrected(self, row: RowVerdict) -> RowVerdict:
        refused = self.settings.on_error == "closed"
        return replace(row, corrected=False, refused=refused, reason=f"{row.reason}; no correction could be written")
