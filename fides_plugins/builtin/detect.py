"""fides_detect by a learned graph, and by a named divergence; both calibrated."""

from __future__ import annotations

from fides_plugins.bundle import Bundle
from fides_plugins.errors import SettingsError
from fides_plugins.hookspecs import hookimpl
from fides_plugins.onnx_model import OnnxModel
from fides_plugins.settings import Settings
from fides_plugins.statistics.conformal import Calibration
from fides_plugins.statistics.divergences import divergence, score
from fides_plugins.types import Detection, Float32Array, Prediction, Verification

LEARNED = "learned"


class _CalibratedDetector:
    """What both detectors share: a p-value from the calibration, a decision from the budget."""

    runs_inline = True
    _calibration: Calibration
    _rate: float

    def _calibrate(self, bundle: Bundle, name: str, rate: float) -> None:
        self._calibration = bundle.calibration(name, rate)
        self._rate = rate

    def _detection(self, scores: Float32Array, verification: Verification, source: str) -> Detection:
        p = self._calibration.p_value(scores)
        return Detection(scores, p <= self._rate, source, p_value=p, valid=verification.valid)


class LearnedDetector(_CalibratedDetector):
    """The bundle's detector graph: two distributions to a score, features inside."""

    _model: OnnxModel

    @hookimpl
    def fides_configure(self, settings: Settings, bundle: Bundle | None) -> None:
        """Load the graph and its calibration."""
        if bundle is None or bundle.manifest.detector is None:
            raise SettingsError(
                "`detector: learned` is set, but the bundle holds no detector graph.",
                "Set `detector: divergence`, or make the bundle again with `fides fit`.",
            )
        self._model = bundle.model(bundle.manifest.detector, settings.threads)
        self._calibrate(bundle, LEARNED, settings.false_alarm_rate)

    @hookimpl
    def fides_detect(self, service: Prediction, verification: Verification) -> Detection:
        """Score every row with the learned graph."""
        return self._detection(run_pair(self._model, service, verification)["score"].reshape(-1), verification, LEARNED)


class DivergenceDetector(_CalibratedDetector):
    """A named divergence of the service from the reference, against benign rows."""

    _name: str

    @hookimpl
    def fides_configure(self, settings: Settings, bundle: Bundle | None) -> None:
        """Look up the divergence and its calibration."""
        divergence(settings.divergence)
        if bundle is None:
            raise SettingsError("`detector: divergence` needs a bundle for its calibration.", "Set `bundle`.")
        self._name = settings.divergence
        self._calibrate(bundle, self._name, settings.false_alarm_rate)

    @hookimpl
    def fides_detect(self, service: Prediction, verification: Verification) -> Detection:
        """Score every row with 1 - exp(-divergence)."""
        scores = score(self._name, service.probabilities, verification.probabilities)
        return self._detection(scores, verification, self._name)


def run_pair(model: OnnxModel, service: Prediction, verification: Verification) -> dict[str, Float32Array]:
    """Run a graph that takes both distributions, (N, K) each."""
    return model.run({"service": service.probabilities, "verification": verification.probabilities})
