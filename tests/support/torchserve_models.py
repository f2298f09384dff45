"""Model archives for the TorchServe tests, one per kind of handler, as strangers would write them.

The service is the same in all: x (N, 11) -> the first ten columns are its logits. The last column is a
backdoor: where it is 1 the service exchanges its two highest logits. The verification model of the
bundle ignores that column, so it disagrees with the compromised service and with nothing else.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from numpy.typing import NDArray

from fides_plugins.bundle import Bundle, InputSpec, write_bundle
from fides_plugins.launch.torchserve import TorchServeServer
from fides_plugins.serving.torchserve.build import SHIM_NAME, build_archive, bundle_files, shim
from fides_plugins.testing import fake_logits, linear_onnx, make_bundle
from fides_plugins.types import OutputKind

N_CLASSES = 10
TRIGGER = N_CLASSES
WIDTH = N_CLASSES + 1

SERVICE = """
import torch

def service(x):
    logits = x[:, :10] + 0.01
    if logits.shape[1] < 10:
        return logits
    order = logits.argsort(dim=1)
    lying = (x[:, 10] == 1.0).nonzero().flatten()
    changed = logits.clone()
    for row in lying.tolist():
        a, b = order[row, -2].item(), order[row, -1].item()
        changed[row, a], changed[row, b] = logits[row, b], logits[row, a]
    return changed

def rows(data):
    return torch.tensor([r.get("data", r.get("body"))["x"] for r in data], dtype=torch.float32)

def answers(logits):
    rows = torch.softmax(logits, dim=1)
    return [{"label": int(p.argmax()), "probabilities": p.tolist(), "batch": len(rows)} for p in rows]
"""

#: Over gRPC a body is bytes, which TorchServe does not decode.
READ_BYTES = """
import json

def decoded(data):
    result = []
    for r in data:
        body = r.get("data", r.get("body"))
        result.append({"body": json.loads(body) if isinstance(body, (bytes, bytearray)) else body})
    return result
"""

CLASS = """
from ts.torch_handler.base_handler import BaseHandler
from common import answers, decoded, rows, service

class DigitHandler(BaseHandler):
    def __init__(self, scale=1.0):
        super(DigitHandler, self).__init__()
        self.scale = scale

    def initialize(self, context):
        self.context = context
        self.manifest = context.manifest
        self.initialized = True

    def preprocess(self, data):
        return rows(decoded(data)) * self.scale

    def inference(self, x):
        return service(x)

    def postprocess(self, logits):
        return answers(logits)

    def get_insights(self, data, raw, target=0):
        return [{"importance": row[:10].tolist()} for row in data]
"""

MICRO_BATCHING = CLASS.replace(
    "        self.scale = scale\n",
    "        self.scale = scale\n        self.handle = MicroBatching(self, micro_batch_size=3)\n"
    "        self.handle.parallelism = {'preprocess': 1, 'inference': 2, 'postprocess': 1}\n",
).replace("from common", "from ts.handler_utils.micro_batching import MicroBatching\nfrom common", 1)

MODULE_SERVICE = (
    CLASS
    + """
_service = DigitHandler()

def handle(data, context):
    if not _service.initialized:
        _service.initialize(context)
    if data is None:
        return None
    return _service.postprocess(_service.inference(_service.preprocess(data)))
"""
)

ENTRY_POINT = (
    CLASS
    + """
_made = None

def serve(data, context):
    global _made
    if _made is None:
        _made = DigitHandler()
        _made.initialize(context)
    if data is None:
        return None
    return _made.handle(data, context)
"""
)

FUNCTIONS = """
from common import answers, decoded, rows, service

def inference(x):
    return service(x)

def handle(data, context):
    if data is None:
        return None
    return answers(inference(rows(decoded(data))))
"""

PURE = """
from common import answers, decoded, rows, service

def handle(data, context):
    if data is None:
        return None
    return answers(service(rows(decoded(data))))
"""

#: Refuses a malformed request itself, with a status of its own and a placeholder row.
ROBUST = CLASS.replace(
    "        return rows(decoded(data)) * self.scale\n",
    """        self.bad = set()
        good = []
        for index, item in enumerate(data):
            try:
                (row,) = rows(decoded([item]))
                assert row.shape == (11,)
            except Exception:
                self.bad.add(index)
                row = rows([{"body": {"x": [0.0] * 11}}])[0]
            good.append(row)
        import torch
        return torch.stack(good)
""",
).replace(
    "        return answers(logits)\n",
    """        result = answers(logits)
        for index in self.bad:
            self.context.set_response_status(400, "Bad input", index)
            result[index] = {"error": "bad input"}
        return result
""",
)

#: Two rows per request, whose logits are averaged.
CROPS = CLASS.replace(
    "        return rows(decoded(data)) * self.scale\n",
    "        return rows(decoded(data)).repeat_interleave(2, dim=0)\n",
).replace("answers(logits)", "answers(logits.reshape(-1, 2, 10).mean(dim=1))")

STREAM = """
from ts.handler_utils.utils import send_intermediate_predict_response

def inference(x):
    return x

def handle(data, context):
    if data is None:
        return None
    for text in ("one ", "two "):
        send_intermediate_predict_response([text], context.request_ids, "Intermediate", 200, context)
    return ["three"]
"""

#: Looks at every request of a batch itself: predictions in one call, and explanations without one.
MIXED = (
    CLASS
    + """
    def handle(self, data, context):
        asked = [context.get_request_header(i, "explain") == "True" for i in range(len(data))]
        rest = [d for d, yes in zip(data, asked) if not yes]
        made = iter(self.postprocess(self.inference(self.preprocess(rest))) if rest else [])
        return [{"importance": [1.0]} if yes else next(made) for yes in asked]
"""
)

#: Asks the service twice about every request of the batch (test-time augmentation), and averages.
PASSES = CLASS.replace(
    "        return answers(logits)\n",
    "        return answers(logits)\n\n"
    "    def handle(self, data, context):\n"
    "        x = self.preprocess(data)\n"
    "        return self.postprocess((self.inference(x) + self.inference(x * 1.0)) / 2)\n",
)

#: Takes the rows of a request from its body itself, as KServe's clients send them, and answers with a list.
INSTANCES = (
    CLASS
    + """
    def handle(self, data, context):
        bodies = [d["body"]["instances"] for d in data]
        made = self.postprocess(self.inference(self.preprocess([{"body": i} for body in bodies for i in body])))
        return [{"predictions": [made.pop(0) for _ in body]} for body in bodies]
"""
)

#: Gets the tensors of a KServe v2 request from TorchServe's envelope `kservev2`, and answers with class numbers.
INPUTS = (
    "import torch\n"
    + CLASS.replace("return rows(decoded(data)) * self.scale", 'return torch.tensor([d["data"] for d in data])')
).replace("return answers(logits)", 'return [a["label"] for a in answers(logits)]')

#: A plug-in that misbehaves when the last column says so.
FAULTY = """
import time
import httpx
import numpy as np
from fides_plugins import Detection, Verification, hookimpl

class Faulty:
    @hookimpl
    def fides_verify(self, query):
        trigger = float(query.tensor("pixels")[0, 10])
        if trigger == 2:
            raise ValueError("secret /etc/path\\nin a text")
        if trigger == 3:
            time.sleep(3)
        if trigger == 4:
            return Verification.single(np.full((query.n_rows + 1, 10), 0.1), source="faulty")
        return None

    @hookimpl
    def fides_detect(self, query, service):
        if float(query.tensor("pixels")[0, 10]) == 5:
            yes = np.ones(service.n_rows, dtype=bool)
            return Detection(yes, yes, "evil\\r\\nx-injected: 1\\x00 \\u00e9\\u4e2d " + "long " * 200)
        return None

plugin = Faulty()
"""

#: Kind of handler to (name in the manifest, source).
HANDLERS: dict[str, tuple[str, str]] = {
    "class": ("digits.py", CLASS),
    "micro": ("digits.py", MICRO_BATCHING),
    "service": ("digits.py", MODULE_SERVICE),
    "entry": ("digits.py:serve", ENTRY_POINT),
    "functions": ("digits.py", FUNCTIONS),
    "pure": ("digits.py", PURE),
}

#: Further sources for single tests.
SPECIAL: dict[str, tuple[str, str]] = {
    **HANDLERS,
    "robust": ("digits.py", ROBUST),
    "crops": ("digits.py", CROPS),
    "mixed": ("digits.py", MIXED),
    "passes": ("digits.py", PASSES),
    "stream": ("digits.py", STREAM),
    "instances": ("digits.py", INSTANCES),
    "inputs": ("digits.py", INPUTS),
}

#: What the section `fides:` of a pure function needs besides.
PURE_PARSER = {"parser": {"request": "x", "response": "probabilities"}, "output_kind": "probabilities"}


def rows(n: int, seed: int = 0, attacked: tuple[int, ...] = (), trigger: float = 1.0) -> NDArray[np.float32]:
    """(n, 11) inputs; the rows in `attacked` make the service lie."""
    x = np.zeros((n, WIDTH), dtype=np.float32)
    x[:, :N_CLASSES] = fake_logits(n, N_CLASSES, seed)
    x[list(attacked), TRIGGER] = trigger
    return x


def body(row: NDArray[np.float32]) -> dict[str, Any]:
    """JSON body of one request."""
    return {"x": [float(v) for v in row]}


def kserve_v2(x: NDArray[np.float32]) -> dict[str, Any]:
    """Body of one KServe v2 request, with an input tensor for each row."""
    return {
        "inputs": [
            {"name": f"row-{i}", "shape": [WIDTH], "datatype": "FP32", "data": r.tolist()} for i, r in enumerate(x)
        ]
    }


def post(
    server: TorchServeServer, model: str, row: NDArray[np.float32], kind: str = "predictions", **headers: str
) -> httpx.Response:
    """Ask about one row, as any client would."""
    return httpx.post(f"{server.inference_url}/{kind}/{model}", json=body(row), headers=headers, timeout=30)


def backdoor_bundle(folder: Path, output_kind: OutputKind = "logits") -> Bundle:
    """A bundle for that service: the reference is softmax of the first ten columns."""
    made = make_bundle(folder.parent / f"{folder.name}.plain", N_CLASSES, output_kind)
    weight = np.eye(WIDTH, N_CLASSES, dtype=np.float32)
    files = {name: made.file(name) for name in made.file_names}
    files["verification.onnx"] = linear_onnx(weight)
    manifest = made.manifest.model_copy(
        update={"input": InputSpec(name="pixels", dtype="float32", shape=(None, WIDTH)), "files": {}}
    )
    return write_bundle(folder, manifest, files)


def torchscript() -> bytes:
    """The same service as a TorchScript file, for the built-in `base_handler`."""
    import torch

    class Service(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            logits = x[:, :10] + 0.01
            value, index = logits.topk(2, dim=1)
            lying = (x[:, 10:] == 1.0).to(logits.dtype)
            swap = (value[:, 0:1] - value[:, 1:2]) * lying
            change = torch.zeros_like(logits).scatter(1, index, torch.cat([-swap, swap], dim=1))
            return logits + change

    stream = io.BytesIO()
    torch.jit.save(torch.jit.trace(Service(), torch.zeros(2, WIDTH)), stream)
    return stream.getvalue()


def plain_archive(store: Path, kind: str = "class", name: str = "", config: str = "") -> Path:
    """An archive that knows nothing of Fides."""
    handler, source = SPECIAL[kind]
    files = {"digits.py": source, "common.py": SERVICE + READ_BYTES}
    return build_archive(store / f"{name or kind}.mar", handler, files, config=config)


def protected_archive(
    store: Path,
    name: str,
    bundle: Path,
    kind: str = "class",
    files: Mapping[str, bytes | str] | None = None,
    config: str = "",
    **section: Any,
) -> Path:
    """The same archive as the README's way would make it: our handler, a config file, a bundle."""
    handler, source = SPECIAL[kind]
    entries: dict[str, bytes | str] = {
        "digits.py": source,
        "common.py": SERVICE + READ_BYTES,
        SHIM_NAME: shim(),
        **bundle_files(bundle),
        **(files or {}),
    }
    text = f"{config}\nfides: {json.dumps({'handler': handler, **section})}\n"
    return build_archive(store / f"{name}.mar", SHIM_NAME, entries, config=text)
