"""Detection, re-classification and the monitor, on the client."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from fides_plugins.attestation.refusal import Refusal
from fides_plugins.bundle import Bundle
from fides_plugins.errors import InputError
from fides_plugins.pipeline import VerifyOutcome
from fides_plugins.protection import Protection
from fides_plugins.settings import Settings
from fides_plugins.statistics.monitor import Alarm, SequenceMonitor
from fides_plugins.types import Float32Array, Query, Verdict, Verification

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
        # References come from the enclave; a client that also ran the model itself would need no enclave.
        self.protection = Protection.load(chosen, bundle=loaded, references="brought", concurrent=False)
        self.bundle = loaded
        self._lock = threading.Lock()
        self.refusals: Counter[str] = Counter()
        self.alarm: Alarm | None = None
        calibrations = loaded.calibrations()
        self._monitor: SequenceMonitor | None = None
        if calibrations:
            rows = min(c.n for c in calibrations.values())
            self._monitor = SequenceMonitor(rows, chosen.monitor_error)

    def input_name(self, inputs: Mapping[str, NDArray[Any]]) -> str:
        """Name of the tensor that the verifier sees.

        Raises
        ------
        InputError
            If it is not among the inputs.
        """
        name = self.protection.input_name
        if name in inputs:
            return name
        if len(inputs) == 1:
            return next(iter(inputs))
        raise InputError(f"The inputs {sorted(inputs)} lack {name!r}.", "Set `input` to the verifier's tensor.")

    def judge(self, query: Query, output: NDArray[Any], reference: Float32Array, raw: Any) -> Answer:
        """Judge an answer whose receipt is good; `output` is what `OutputCodec.read` reads."""
        brought = VerifyOutcome(Verification.single(reference, SOURCE))
        verdict = self.protection.judge(query, output, brought)
        if self._monitor is not None:
            with self._lock:
                self.alarm = self._monitor.update(verdict.p_value) or self.alarm
        return Answer(verdict, output, raw, None, reference)

    def refuse(self, query: Query, output: NDArray[Any], refusal: Refusal, raw: Any) -> Answer:
        """The verdict on an answer whose receipt is refused: every row attacked, nothing to use."""
        with self._lock:
            self.refusals[refusal.code] += 1
        return Answer(self.protection.refuse(query, refusal.reason), output, raw, refusal, None)

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
        self.protection.close()
