"""What both steps share: settings from a model's parameters, the pipeline, logging, refusals."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray

from fides_plugins.errors import FidesError, InputError
from fides_plugins.observation.metrics import MetricsRecorder
from fides_plugins.pipeline import Pipeline
from fides_plugins.serving.triton.metrics import TritonMetrics
from fides_plugins.settings import Settings, nest
from fides_plugins.types import Query

logger = logging.getLogger("fides_plugins")

#: Parameters of the adapter itself; `fides.*` are the settings every host knows.
STEP_PREFIX = "fides_step."


class _TritonLogHandler(logging.Handler):
    """Sends this package's log records to Triton's log."""

    def emit(self, record: logging.LogRecord) -> None:
        write = pb_utils.Logger.log_error if record.levelno >= logging.ERROR else pb_utils.Logger.log_warn
        write(self.format(record))


class Step:
    """One python-backend model of the ensemble.

    Parameters
    ----------
    arguments:
        What Triton hands to `initialize`.
    alarm:
        Whether this step sees the verdicts and so follows their sequence with the service alarm.

    Raises
    ------
    pb_utils.TritonModelException
        If settings, bundle or plug-ins cannot be used: the model then does not load, and a version that
        is being served stays. The message names the cause and the remedy.
    """

    def __init__(self, arguments: Mapping[str, str], *, alarm: bool = False) -> None:
        if not any(isinstance(h, _TritonLogHandler) for h in logger.handlers):
            logger.addHandler(_TritonLogHandler())
            logger.propagate = False
        self.config: dict[str, Any] = json.loads(arguments["model_config"])
        self.name = arguments["model_name"]
        self.parameters = {k: str(v.get("string_value", "")) for k, v in self.config.get("parameters", {}).items()}
        self.batching = int(self.config.get("max_batch_size", 0)) > 0
        self.batchless = self.option("batchless") == "true"
        self.input_names = tuple(item["name"] for item in self.config.get("input", []))
        try:
            self.settings = Settings.for_host(nest(self.parameters))
            self.pipeline = Pipeline.from_settings(self.settings, base=arguments["model_repository"])
        except FidesError as error:
            raise pb_utils.TritonModelException(f"fides: {self.name} cannot start: {error}") from None
        self._backend = TritonMetrics()
        self.metrics = MetricsRecorder(self._backend, self.settings.service_name or self.name, alarm)
        self.metrics.attach(self.pipeline)

    def option(self, name: str, default: str = "") -> str:
        """A parameter of the adapter itself."""
        return self.parameters.get(STEP_PREFIX + name, default)

    def array(self, request: Any, name: str) -> NDArray[Any] | None:
        """An input of the request with the row as first axis; None where an optional one is absent."""
        tensor = pb_utils.get_input_tensor_by_name(request, name)
        if tensor is None:
            return None
        array: NDArray[Any] = tensor.as_numpy()
        return array[None, ...] if self.batchless else array

    def tensor(self, name: str, array: NDArray[Any], per_row: bool = False) -> Any:
        """An output tensor. `per_row`: one value per row, which a batching model gives as (N, 1)."""
        if per_row and self.batching:
            array = array.reshape(len(array), 1)
        elif self.batchless and not per_row:
            array = array[0]
        return pb_utils.Tensor(name, np.ascontiguousarray(array))

    def query(
        self,
        arrays: Mapping[str, NDArray[Any]],
        n_rows: int,
        ids: tuple[str, ...] = (),
        metadata: Mapping[str, str] | None = None,
    ) -> Query:
        """A query of those tensors that have one entry per row; of an empty one where there is none."""
        rows = {name: a for name, a in arrays.items() if a.ndim and len(a) == n_rows}
        model = self.settings.service_name or self.name
        rest = (ids if len(ids) == n_rows else (), model, {"server": "triton", **(metadata or {})})
        return Query(rows, *rest) if rows else Query.without_inputs(n_rows, *rest)

    def close(self) -> None:
        """Tell the plug-ins that the model is unloaded."""
        self.pipeline.close()
        self.metrics.fides_unconfigure()
        self._backend.close()


def row_ids(request_id: str, n_rows: int) -> tuple[str, ...]:
    """One id per row from the request's id; none where the client gave none."""
    if not request_id:
        return ()
    return (request_id,) if n_rows == 1 else tuple(f"{request_id}#{i}" for i in range(n_rows))


def refusal(message: str, attacked: bool) -> Any:
    """An error answer for one request.

    The python backend of Triton 2.51 knows no ABORTED and no HTTP status 409: an attack is answered with
    ALREADY_EXISTS, the code whose standard HTTP equivalent is 409 (gRPC ALREADY_EXISTS; this Triton's
    HTTP front end makes it 400), which clients do not retry; missing validation with UNAVAILABLE
    (gRPC UNAVAILABLE, HTTP 503), which they may.
    """
    code = pb_utils.TritonError.ALREADY_EXISTS if attacked else pb_utils.TritonError.UNAVAILABLE
    return pb_utils.InferenceResponse(output_tensors=[], error=pb_utils.TritonError(f"fides: {message}", code))


def safe_text(error: Exception) -> str:
    """What a client may read about an error: our own words, or a class name; never a path."""
    return error.cause_text if isinstance(error, InputError) else f"internal error ({type(error).__name__})"
