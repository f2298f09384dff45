"""fides_verify by the bundle's ONNX verification model."""

from __future__ import annotations

from fides_plugins.bundle import Bundle, VerificationSpec
from fides_plugins.errors import BundleError, InputError
from fides_plugins.hookspecs import hookimpl
from fides_plugins.onnx_model import OnnxModel
from fides_plugins.settings import Settings
from fides_plugins.types import Query, Verification


class OnnxVerifier:
    """Runs the distilled model on the tensor that the service model gets."""

    _model: OnnxModel
    _spec: VerificationSpec
    _input: str

    @hookimpl
    def fides_configure(self, settings: Settings, bundle: Bundle | None) -> None:
        """Load the graph once."""
        if bundle is None or bundle.manifest.verification is None:
            raise BundleError("The bundle holds no verification model.", "Make one with `fides fit --service`.")
        self._spec = bundle.manifest.verification
        self._model = bundle.model(self._spec, settings.threads)
        declared = bundle.manifest.input.name if bundle.manifest.input is not None else ""
        self._input = settings.input or declared

    @hookimpl
    def fides_verify(self, query: Query) -> Verification:
        """(N, 1, K) reference; rows whose output is not finite are not available."""
        tensor = query.tensor(self._input)
        (info,) = self._model.inputs
        if tensor.dtype != info.dtype:
            raise InputError(f"Input {self._input!r} has dtype {tensor.dtype}; expected {info.dtype}.")
        output = self._model.run({info.name: tensor})[self._spec.output_name]
        reference = self._spec.codec.read(output)
        return Verification.single(reference.probabilities, "verifier", available=reference.valid)
