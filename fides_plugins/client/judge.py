"""Detection, re-classification and the monitor, on the client."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fides_plugins.attestation.refusal import Refusal
from fides_plugins.bundle import Bundle
from fides_plugins.errors import FidesError, InputError
from fides_plugins.manager import create_plugin_manager
from fides_plugins.pipeline import Pipeline, VerifyOutcome
from fides_plugins.settings import PluginSettings, Settings
from fides_plugins.statistics.monitor import Alarm, SequenceMonitor
from fides_plugins.types import Float32Array, Prediction, Query, Status, Verdict, Verification

#: References come from the enclave; a client that also ran the model itself would need no enclave.
_NOT_HERE = ("verifier", "remote")
SOURCE = "enclave"


@dataclass(frozen=True)
class Answer:
    """One answer and what is known about it.

    Attributes
    ----------
    verdict:
        Per row: status, score, p-value, what to use, why.
    output:
        The service's class output as it came, (N, K).
    raw:
        The server library's own response object.
    refusal:
        Why the receipt was refused; None where it was good.
    reference:
        The enclave's reference, (N, K) float32; None where the receipt was refused.
    """

    verdict: Verdict
    output: NDArray[Any]
    raw: Any
    refusal: Refusal | None
    reference: Float32Array | None


class ClientJudge:
    """The pipeline from detection on, with the references that receipts bring. Thread-safe.

    Parameters
    ----------
    bundle:
        Folder, or a loaded bundle: detector, re-classifier and calibration. Its verification model, if
        there is one, is not run.
    settings:
        Default: mode "correct", `on_error` "closed".

    Attributes
    ----------
    alarm:
        Set once the sequence of answers shows that the service as a whole is under attack.
    refusals:
        Refused receipts by code.
    """

    def __init__(self, bundle: Bundle | str | Path, settings: Settings | None = None) -> None:
        loaded = bundle if isinstance(bundle, Bundle) else Bundle.load(bundle)
        chosen = settings or Settings(mode="correct", on_error="closed")
        plugins = chosen.plugins.model_copy(update={"blocked": (*chosen.plugins.blocked, *_NOT_HERE)})
        self.settings = chosen.model_copy(update={"plugins": PluginSettings.model_validate(plugins.model_dump())})
        self.bundle = loaded
        self.pipeline = Pipeline(self.settings, loaded, create_plugin_manager(self.settings, loaded))
        service = loaded.manifest.service
        self._kind = self.settings.output_kind or service.output_kind
        self._temperature = service.temperature
        self._lock = threading.Lock()
        self.refusals: Counter[str] = Counter()
        self.alarm: Alarm | None = None
        calibrations = loaded.calibrations()
        self._monitor: SequenceMonitor | None = None
        if calibrations:
            rows = min(c.n for c in calibrations.values())
            self._monitor = SequenceMonitor(rows, self.settings.monitor_error)

    def input_name(self, inputs: dict[str, NDArray[Any]]) -> str:
        """Name of the tensor that the verifier sees.

        Raises
        ------
        InputError
            If it is not among the inputs.
        """
        spec = self.bundle.manifest.input
        name = self.settings.input or (spec.name if spec is not None else "")
        if name in inputs:
            return name
        if len(inputs) == 1:
            return next(iter(inputs))
        raise InputError(f"The inputs {sorted(inputs)} lack {name!r}.", "Set `input` to the verifier's tensor.")

    def judge(self, query: Query, output: NDArray[Any], reference: Float32Array, raw: Any) -> Answer:
        """Judge an answer whose receipt is good; `output` is (N, K), or of a shape that ends so."""
        verification = Verification.single(reference, SOURCE)
        try:
            service = Prediction.from_output(output.reshape(len(output), -1), self._kind, self._temperature)
        except (FidesError, TypeError, ValueError) as error:
            reason = error.cause_text if isinstance(error, FidesError) else "the answer is no array of rows"
            verdict = self.pipeline.fail(query, query.n_rows, reason)
        else:
            verdict = self.pipeline.validate(query, service, VerifyOutcome(verification))
        self._observe(verdict)
        return Answer(verdict, output, raw, None, reference)

    def refuse(self, query: Query, output: NDArray[Any], refusal: Refusal, raw: Any) -> Answer:
        """The verdict on an answer whose receipt is refused: every row attacked, nothing to use."""
        n, k = query.n_rows, self.bundle.n_classes
        unknown = np.full(n, -1, dtype=np.int64)
        verdict = Verdict(
            status=np.full(n, Status.ATTACKED, dtype=np.uint8),
            score=np.ones(n, dtype=np.float32),
            p_value=np.full(n, np.nan, dtype=np.float32),
            service_label=unknown,
            verified_label=unknown,
            label=unknown,
            probabilities=np.zeros((n, k), dtype=np.float32),
            corrected=np.zeros(n, dtype=np.bool_),
            refused=np.ones(n, dtype=np.bool_),
            reason_codes=np.zeros(n, dtype=np.int64),
            reasons=(refusal.reason,),
        )
        with self._lock:
            self.refusals[refusal.code] += 1
        self.pipeline.record(query, verdict)
        return Answer(verdict, output, raw, refusal, None)

    def _observe(self, verdict: Verdict) -> None:
        if self._monitor is None:
            return
        with self._lock:
            self.alarm = self._monitor.update(verdict.p_value) or self.alarm

    @property
    def e_value(self) -> float:
        """The monitor's evidence against benign traffic; 1 at the start, and without calibration always."""
        return self._monitor.e_value if self._monitor is not None else 1.0

    def reset(self) -> None:
        """After an incident: no alarm, and the evidence starts again."""
        with self._lock:
            self.alarm = None
            if self._monitor is not None:
                self._monitor.reset()

    def close(self) -> None:
        """Tell the plug-ins."""
        self.pipeline.close()
