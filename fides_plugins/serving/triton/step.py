"""What both steps share: their protection, tensors with the row as first axis, logging, refusals.

`triton_python_backend_utils` exists only inside Triton's python backend, which runs each step in a process of its own.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray

from fides_plugins.errors import FidesError
from fides_plugins.protection import Protection
from fides_plugins.serving.triton.metrics import TritonMetrics
from fides_plugins.serving.triton.wire import STEP_PREFIX
from fides_plugins.settings import Settings, nest

logger = logging.getLogger("fides_plugins")


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
        # The service takes one row per request and its tensors have no row axis: it is added here and taken off again.
        self.batchless = self.option("batchless") == "true"
        self.input_names = tuple(item["name"] for item in self.config.get("input", []))
        self._metrics = TritonMetrics()
        try:
            self.settings = Settings.for_host(nest(self.parameters))
            self.protection = Protection.load(
                self.settings,
                arguments["model_repository"],
                host="triton",
                model_name=self.name,
                metrics=self._metrics,
                alarm=alarm,
                concurrent=False,  # Triton itself runs `fides_verify` beside the service
            )
        except FidesError as error:
            self._metrics.close()
            raise self.cannot_start(error) from None

    def cannot_start(self, error: object) -> Exception:
        """What keeps the model from loading, as Triton shows it."""
        return pb_utils.TritonModelException(f"fides: {self.name} cannot start: {error}")  # type: ignore[no-any-return]

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

    def arrays(self, request: Any, names: tuple[str, ...]) -> dict[str, NDArray[Any]]:
        """Those of the inputs that the request has."""
        return {name: a for name in names if (a := self.array(request, name)) is not None}

    def tensor(self, name: str, array: NDArray[Any], per_row: bool = False) -> Any:
        """An output tensor. `per_row`: one value per row, which a batching model gives as (N, 1)."""
        if per_row and self.batching:
            array = array.reshape(len(array), 1)
        elif self.batchless and not per_row:
            array = array[0]
        return pb_utils.Tensor(name, np.ascontiguousarray(array))

    def finalize(self) -> None:
        """The model is unloaded: close the plug-ins."""
        self.protection.close()
        self._metrics.close()


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
