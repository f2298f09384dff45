"""A service model for Triton's python backend that runs an ONNX file, for servers without the ONNX backend.

The server that PyPI carries has the python backend only. A `model.py` of two lines makes a service
model of `model.onnx` next to it:
`from fides_plugins.serving.triton.onnx_service import TritonPythonModel`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray

from fides_plugins.errors import FidesError, InputError
from fides_plugins.onnx_model import OnnxModel

MODEL_FILE = "model.onnx"


class TritonPythonModel:
    """Runs `model.onnx` of the version folder; tensor names are the graph's own."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Load the graph."""
        path = Path(args["model_repository"]) / args["model_version"] / MODEL_FILE
        try:
            self._model = OnnxModel(path.read_bytes(), name=MODEL_FILE)
        except (FidesError, OSError) as error:
            raise pb_utils.TritonModelException(f"{args['model_name']} cannot start: {error}") from None

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """One response per request."""
        return [self._answer(request) for request in requests]

    def predict(self, arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Outputs by name. Override it to build a service that does more, or lies, for a demonstration."""
        return self._model.run(arrays)

    def _answer(self, request: Any) -> Any:
        try:
            arrays = {
                info.name: pb_utils.get_input_tensor_by_name(request, info.name).as_numpy()
                for info in self._model.inputs
            }
            outputs = self.predict(arrays)
        except InputError as error:
            problem = pb_utils.TritonError(error.cause_text, pb_utils.TritonError.INVALID_ARG)
            return pb_utils.InferenceResponse(output_tensors=[], error=problem)
        except Exception as error:  # host boundary: no traceback to a client
            pb_utils.Logger.log_error(f"the service model failed: {error}")
            problem = pb_utils.TritonError("the service model failed", pb_utils.TritonError.INTERNAL)
            return pb_utils.InferenceResponse(output_tensors=[], error=problem)
        wanted = request.requested_output_names()
        tensors = [pb_utils.Tensor(n, np.ascontiguousarray(outputs[n])) for n in wanted if n in outputs]
        return pb_utils.InferenceResponse(tensors)
