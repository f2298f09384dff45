"""What a step's `model.py` imports: light classes that load the real step when it is initialised.

Triton imports every `model.py` twice at a load, once only to ask whether it completes its configuration.
That first import must not pay for onnxruntime and all plug-ins.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any


class _LazyModel:
    def initialize(self, args: Mapping[str, str]) -> None:
        """Import the step, which is in the module of the same name, and initialise it."""
        module = importlib.import_module(f"fides_plugins.serving.triton.{type(self).__name__.lower()}")
        self._model = module.TritonPythonModel(args)

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """One response per request."""
        responses: list[Any] = self._model.execute(requests)
        return responses

    def finalize(self) -> None:
        """Close the step."""
        if hasattr(self, "_model"):
            self._model.finalize()


class Verify(_LazyModel):
    """`fides_verify`: see `fides_plugins.serving.triton.verify`."""


class Validate(_LazyModel):
    """`fides_validate`: see `fides_plugins.serving.triton.validate`."""
