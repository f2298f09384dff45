"""The demonstration on a real Triton: a repository as a team would have it, attached by Fides, then compromised.

The attacker of this story can write to the host's disk: the service model's `model.py` is replaced by one that
lies, and the server is told to reload it. Everything else stays as it was.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fides_plugins.demo.digits import INPUT_NAME, OUTPUT_NAME
from fides_plugins.demo.hosts import MODE, Host, Received
from fides_plugins.launch.triton import TritonServer
from fides_plugins.serving.triton.attach import attach
from fides_plugins.serving.triton.plan import AttachOptions
from fides_plugins.types import Float32Array

MODEL = "digits"
BATCH = 64

CONFIG = f"""name: "{MODEL}"
backend: "python"
max_batch_size: {BATCH}
input [ {{ name: "{INPUT_NAME}" data_type: TYPE_FP32 dims: [ 1, 8, 8 ] }} ]
output [ {{ name: "{OUTPUT_NAME}" data_type: TYPE_FP32 dims: [ 10 ] }} ]
instance_group [ {{ kind: KIND_CPU count: 1 }} ]
"""
HONEST = "from fides_plugins.serving.triton.onnx_service import TritonPythonModel\n"
COMPROMISED = """import numpy as np
from fides_plugins.demo.compromised import tamper_logits
from fides_plugins.serving.triton import onnx_service

class TritonPythonModel(onnx_service.TritonPythonModel):
    rng = np.random.default_rng({seed})

    def predict(self, arrays):
        return {{"{output}": tamper_logits(super().predict(arrays)["{output}"], "{attack}", self.rng)}}
"""


class TritonHost(Host):
    """A server in explicit mode, with the model taken over by the protected one."""

    name = "Triton"

    def start(self, stack: ExitStack) -> None:
        """See `Host.start`."""
        import tritonclient.http as client

        d = self.deployment
        repository = d.folder / "model_repository"
        version = repository / MODEL / "1"
        version.mkdir(parents=True)
        (repository / MODEL / "config.pbtxt").write_text(CONFIG)
        (version / "model.onnx").write_bytes(d.service)
        self._source = version / "model.py"
        self._source.write_text(HONEST)
        settings = {"mode": MODE, "false_alarm_rate": str(d.false_alarm_rate)}
        self._attached = attach(repository, MODEL, AttachOptions(bundle=d.bundle, settings=settings))
        config_name = self._attached.flag.partition("=")[2]
        self._server = stack.enter_context(TritonServer(repository, explicit=True, config_name=config_name))
        self._client = stack.enter_context(client.InferenceServerClient(self._server.http_address))
        self._input = client.InferInput
        self._attack = ""

    def _infer(self, model: str, images: Float32Array) -> dict[str, NDArray[Any]]:
        tensor = self._input(INPUT_NAME, list(images.shape), "FP32")
        tensor.set_data_from_numpy(np.ascontiguousarray(images))
        result = self._client.infer(model, [tensor])
        return {o["name"]: result.as_numpy(o["name"]) for o in result.get_response()["outputs"]}

    def _compromise(self, attack: str) -> None:
        if attack == self._attack:
            return
        seed = self.deployment.seed
        source = COMPROMISED.format(seed=seed, output=OUTPUT_NAME, attack=attack) if attack else HONEST
        self._source.write_text(source)
        self._server.api.load(self._attached.base)
        self._attack = attack

    def ask(self, images: Float32Array, attack: str = "") -> Received:
        """See `Host.ask`."""
        self._compromise(attack)
        chunks = [images[i : i + BATCH] for i in range(0, len(images), BATCH)]
        parts = [self._infer(self._attached.verdict_model, c) for c in chunks]
        joined = {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}
        return Received(
            joined[OUTPUT_NAME].argmax(axis=1),
            np.array([s.decode() for s in joined["FIDES_STATUS"].ravel()]),
            joined["FIDES_LABEL"].ravel(),
            joined["FIDES_P_VALUE"].ravel(),
        )

    def call(self, image: Float32Array, protected: bool) -> None:
        """See `Host.call`."""
        self._compromise("")
        self._infer(MODEL if protected else self._attached.base, image)
