"""Between a handler's `inference()` and its protection: verify while it runs, then judge what it returned.

Nothing here raises: what goes wrong on Fides' side becomes rows with the status `error`, which policy
passes or refuses.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fides_plugins.errors import FidesError
from fides_plugins.observation.metrics import MetricsBackend
from fides_plugins.pipeline import VerifyOutcome
from fides_plugins.policy import failed_verdict
from fides_plugins.protection import INTERNAL, Protection
from fides_plugins.serving.http import RowVerdict, rows_of
from fides_plugins.serving.torchserve.receipts import Receipts
from fides_plugins.serving.torchserve.tensors import ClassOutput, query_inputs
from fides_plugins.settings import Settings
from fides_plugins.types import Query, Verdict

logger = logging.getLogger("fides_plugins")

#: Names a tensor that neither the settings nor the bundle name.
DEFAULT_INPUT = "input"


@dataclass(frozen=True, eq=False)
class PendingCall:
    """A call of `inference()` whose input is being verified, or why it cannot be."""

    query: Query | None = None
    outcome: Callable[[], VerifyOutcome] = lambda: VerifyOutcome(None)
    problem: str = ""


class InferenceJudge:
    """Judges what `inference()` returns. Its parameters are those of `Protection.load`; the bundle's path is absolute.

    Attributes
    ----------
    protection:
        Where a bundle is missing or was changed, one for which every row is `error`: the server starts.
    """

    def __init__(
        self, settings: Settings, model_name: str, concurrent: bool = True, metrics: MetricsBackend | None = None
    ) -> None:
        self.protection = Protection.load(
            settings,
            host="torchserve",
            model_name=model_name,
            metrics=metrics,
            on_bad_bundle="error",
            concurrent=concurrent,
        )
        bundle = self.protection.bundle
        declared = bundle.manifest.input if bundle is not None else None
        self._input_name = self.protection.input_name or DEFAULT_INPUT
        self._input_rank = len(declared.shape) if declared is not None else None

    def failed(self, reason: str) -> RowVerdict:
        """Verdict of a request for which there is no row to judge."""
        verdict = failed_verdict(self.protection.settings, 1, len(self.protection.class_names), reason)
        return rows_of(verdict)[0]

    def unjudged(
        self, n_rows: int, reason: str, request_ids: Sequence[str] = (), *, exempt: bool = False
    ) -> list[RowVerdict]:
        """Verdicts on rows that cannot be judged, shown to all observers."""
        return rows_of(self.protection.unjudged(n_rows, reason, request_ids, exempt=exempt))

    def lied(self, n_rows: int, request_id: str, reason: str) -> RowVerdict:
        """The verdict on an answer that contradicts what was judged, shown to all observers."""
        withheld = self.protection.settings.mode in ("correct", "reject")
        query = self.protection.query({}, n_rows, [request_id] * n_rows)
        return rows_of(self.protection.refuse(query, reason, withheld=withheld))[0]

    def begin(self, data: Any, request_ids: Sequence[str] = (), receipts: Receipts | None = None) -> PendingCall:
        """Start the verification of what `inference()` gets."""
        if self.protection.problem:
            return PendingCall(problem=self.protection.problem)
        try:
            inputs = query_inputs(data, self._input_name, self._input_rank)
            n_rows = len(inputs.get(self._input_name, next(iter(inputs.values()))))
            signed = receipts.signed(n_rows) if receipts is not None else ()
            query = self.protection.query(inputs, n_rows, request_ids, signed)
            return PendingCall(query, self.protection.begin(query))
        except FidesError as error:
            return PendingCall(problem=error.cause_text)
        except Exception:  # host boundary: whatever a handler passes around, its own inference() must still run
            logger.exception("cannot read the input of inference()")
            return PendingCall(problem=INTERNAL)

    def judge(self, pending: PendingCall, output: Any) -> tuple[list[RowVerdict], Any, str]:
        """Verdict per row, what `inference()` should return, and why nothing could be read where there is no row."""
        n_rows = pending.query.n_rows if pending.query is not None else 0
        try:
            found = ClassOutput.find(output, self.protection.settings.output)
            verdict = self.judge_array(pending, found.array)
            written, verdict = self.protection.correct(found.array, verdict)
            if written is not found.array:
                output, verdict = self._replaced(found, written, verdict)
            return rows_of(verdict), output, ""
        except FidesError as error:
            reason = pending.problem or error.cause_text
        except Exception:  # host boundary: the service's answer is there and must reach policy, marked
            logger.exception("the protection failed")
            reason = INTERNAL
        return self.unjudged(n_rows, reason), output, reason

    def judge_array(self, pending: PendingCall, array: NDArray[Any]) -> Verdict:
        """Verdict for a class output that the caller has extracted."""
        if pending.query is None:
            return self.protection.unjudged(len(array) if array.ndim else 0, pending.problem or INTERNAL)
        return self.protection.judge(pending.query, array, pending.outcome())

    def _replaced(self, found: ClassOutput, written: NDArray[Any], verdict: Verdict) -> tuple[Any, Verdict]:
        try:
            rows = np.flatnonzero(verdict.corrected)
            return found.replaced(rows, written[rows]), verdict
        except Exception:  # host boundary: an output of a strange type; the rows are attacked and uncorrected
            logger.exception("a correction cannot be written back")
            return found.whole, self.protection.uncorrected(verdict)
