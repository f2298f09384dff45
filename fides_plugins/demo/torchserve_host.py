"""The demonstration on a real TorchServe."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import numpy as np

from fides_plugins.demo.compromised import ATTACKS
from fides_plugins.demo.hosts import MODE, Host, Received
from fides_plugins.launch.torchserve import TorchServeServer
from fides_plugins.serving.torchserve.build import SHIM_NAME, build_archive, bundle_files, shim
from fides_plugins.types import Float32Array

CLIENTS = 4
BARE = "digits_bare"

# A handler as a team would have written it: it knows nothing of Fides. A compromised host runs the second
# form, in which the attacker has added two lines.
HANDLER = '''"""Digits: JSON pixels in, class probabilities out."""

import json
import os

import numpy as np
import onnxruntime


class DigitsHandler:
    def initialize(self, context):
        folder = context.system_properties["model_dir"]
        self.session = onnxruntime.InferenceSession(os.path.join(folder, "service.onnx"))
        self.initialized = True

    def preprocess(self, data):
        bodies = [row.get("body") or row.get("data") for row in data]
        rows = [json.loads(b) if isinstance(b, (bytes, bytearray)) else b for b in bodies]
        return np.asarray(rows, dtype=np.float32).reshape(-1, 1, 8, 8)

    def inference(self, pixels):
        logits = self.session.run(None, {"image": pixels})[0]
        return logits

    def postprocess(self, logits):
        return [{"digit": int(row.argmax()), "logits": [round(float(v), 6) for v in row]} for row in logits]

    def handle(self, data, context):
        return self.postprocess(self.inference(self.preprocess(data)))
'''
TAMPERING = """
        import numpy
        from fides_plugins.demo.compromised import tamper_logits
        self.rng = getattr(self, "rng", numpy.random.default_rng({seed}))
        return tamper_logits(logits, "{attack}", self.rng)
"""


CONFIG = f"""fides:
  handler: digits_handler.py
  bundle: fides_bundle
  mode: {MODE}
  false_alarm_rate: {{rate}}
  input: image
"""


class TorchServeHost(Host):
    """One server with the bare model, the protected one, and a protected compromised one per attack."""

    name = "TorchServe"

    def start(self, stack: ExitStack) -> None:
        """See `Host.start`."""
        import httpx

        d = self.deployment
        store = d.folder / "model_store"
        store.mkdir(parents=True)
        plain: dict[str, bytes | str] = {"digits_handler.py": HANDLER, "service.onnx": d.service}
        build_archive(store / f"{BARE}.mar", "digits_handler.py", plain)
        config = CONFIG.format(rate=d.false_alarm_rate)
        for attack in ("", *ATTACKS):
            lie = "\n" + TAMPERING.format(seed=d.seed, attack=attack).strip("\n") + "\n"
            source = HANDLER.replace("\n        return logits\n", lie) if attack else HANDLER
            files = {**plain, "digits_handler.py": source, SHIM_NAME: shim(), **bundle_files(d.bundle)}
            build_archive(store / f"digits{attack}.mar", SHIM_NAME, files, config=config)
        archives = {archive.stem: archive.name for archive in store.iterdir()}
        server = stack.enter_context(TorchServeServer(store, archives, ready_timeout_s=120))
        self._client = stack.enter_context(httpx.Client(base_url=server.inference_url, timeout=30))

    def _post(self, model: str, pixels: Any) -> Any:
        response = self._client.post(f"/predictions/{model}", content=json.dumps(pixels))
        return response.raise_for_status()

    def ask(self, images: Float32Array, attack: str = "") -> Received:
        """See `Host.ask`."""
        with ThreadPoolExecutor(CLIENTS) as pool:
            responses = list(pool.map(lambda row: self._post(f"digits{attack}", row), images.tolist()))
        return Received(
            np.array([r.json()["digit"] for r in responses]),
            np.array([r.headers["x-fides-status"] for r in responses]),
            np.array([int(r.headers.get("x-fides-label", -1)) for r in responses]),
            np.array([float(r.headers.get("x-fides-p-value", "nan")) for r in responses], np.float32),
        )

    def call(self, image: Float32Array, protected: bool) -> None:
        """See `Host.call`."""
        self._post("digits" if protected else BARE, image[0].tolist())
