"""fides_reclassify by the bundle's learned graph."""

from __future__ import annotations

from fides_plugins.builtin.detect import run_pair
from fides_plugins.bundle import Bundle
from fides_plugins.hookspecs import hookimpl
from fides_plugins.onnx_model import OnnxModel
from fides_plugins.settings import Settings
from fides_plugins.types import Prediction, Reclassification, Verification


class LearnedReclassifier:
    """The bundle's re-classifier graph; without one, the reference itself is the correction."""

    runs_inline = True
    _model: OnnxModel | None = None

    @hookimpl
    def fides_configure(self, settings: Settings, bundle: Bundle | None) -> None:
        """Load the graph once."""
        if bundle is not None and bundle.manifest.reclassifier is not None:
            self._model = bundle.model(bundle.manifest.reclassifier, settings.threads)

    @hookimpl(trylast=True)
    def fides_reclassify(self, service: Prediction, verification: Verification) -> Reclassification:
        """(N, K) corrected distribution; rows without a reference have no correction."""
        if self._model is None:
            return Reclassification(verification.probabilities, "reference", valid=verification.valid)
        corrected = run_pair(self._model, service, verification)["probabilities"]
        return Reclassification(corrected, "reclassifier", valid=verification.valid)
