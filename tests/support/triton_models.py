"""Model repositories for the Triton tests: tiny, real ONNX models, and a service that can be made to lie.

The service and the verification model are linear: images (N, 1, 8, 8) -> flatten -> 10 logits. A request
parameter `attack` ("all" or row numbers like "0,2") makes the service exchange its two highest logits in
those rows; that is the compromised service of these tests.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fides_plugins.bundle import InputSpec, Manifest, VerificationSpec, write_bundle
from fides_plugins.testing import make_bundle
from tests.support.paths import REPOSITORY

IMAGE = (1, 8, 8)
N_CLASSES = 10

_WEIGHT = np.random.default_rng(3).normal(0, 1, (64, N_CLASSES)).astype(np.float32)
_INVERSE = np.linalg.pinv(_WEIGHT)

LYING_SERVICE = """
import json
import numpy as np
from fides_plugins.serving.triton import onnx_service
import triton_python_backend_utils as pb_utils

class TritonPythonModel(onnx_service.TritonPythonModel):
    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        self.attack = json.loads(request.parameters() or "{}").get("attack", "")
        (response,) = super().execute([request])
        return response

    def predict(self, arrays):
        outputs = super().predict(arrays)
        name = next(iter(outputs))
        if self.attack:
            lie = np.array(outputs[name])
            rows = range(len(lie)) if self.attack == "all" else [int(r) for r in self.attack.split(",")]
            for row in rows:
                a, b = np.argsort(lie[row])[-2:]
                lie[row, [a, b]] = lie[row, [b, a]]
            outputs[name] = lie
        return outputs
"""


def images(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Images (N, 1, 8, 8) for which the verification model answers with these logits."""
    return np.ascontiguousarray((logits @ _INVERSE).reshape(-1, *IMAGE), dtype=np.float32)


def linear_image_onnx(input_name: str, output_name: str, noise: float = 0.0) -> bytes:
    """An ONNX graph images -> logits; `noise` moves the weights a little, as training would."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    weight = _WEIGHT + np.random.default_rng(4).normal(0, 1, _WEIGHT.shape).astype(np.float32) * np.float32(noise)
    nodes = [
        helper.make_node("Flatten", [input_name], ["flat"], axis=1),
        helper.make_node("MatMul", ["flat", "weight"], [output_name]),
    ]
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info(input_name, TensorProto.FLOAT, ["N", *IMAGE])],
        [helper.make_tensor_value_info(output_name, TensorProto.FLOAT, ["N", N_CLASSES])],
        [numpy_helper.from_array(weight, "weight")],
    )
    model = helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    return bytes(model.SerializeToString())


def image_bundle(folder: Path, input_name: str = "image", **manifest: Any) -> Path:
    """A bundle whose verification model takes images; calibrated like the fake bundle of `testing`."""
    fake = make_bundle(folder.parent / f".{folder.name}-fake")
    files = {name: fake.file(name) for name in fake.file_names}
    files["verification.onnx"] = linear_image_onnx("image", "logits")
    fields = fake.manifest.model_dump()
    fields |= {
        "input": InputSpec(name=input_name, dtype="float32", shape=(None, *IMAGE)),
        "verification": VerificationSpec(input_name="image"),
        "files": {},
        **manifest,
    }
    write_bundle(folder, Manifest.model_validate(_plain(fields)), files)
    shutil.rmtree(folder.parent / f".{folder.name}-fake")
    return folder


def _plain(fields: dict[str, Any]) -> dict[str, Any]:
    return {k: v.model_dump() if hasattr(v, "model_dump") else v for k, v in fields.items()}


def set_parameter(config: Path, key: str, value: str) -> None:
    """Set a parameter of a config.pbtxt that may have it already."""
    lines = [line for line in config.read_text().splitlines() if f'key: "{key}"' not in line]
    lines.append(f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}')
    config.write_text("\n".join(lines) + "\n")


def template_repository(target: Path, modes: tuple[str, ...] = (), **parameters: str) -> Path:
    """A copy of `model_repository/` with tiny models, a service that lies when told to, and its bundle.

    For each of `modes` there is a further protected model `digits_<mode>`, so that one server shows them all.
    """
    shutil.copytree(REPOSITORY / "model_repository", target)
    for artefact in (target / "digits_base" / "1" / "model.onnx", target / "fides_verify" / "bundle"):
        if artefact.is_dir():
            shutil.rmtree(artefact)
        artefact.unlink(missing_ok=True)
    (target / "digits_base" / "1" / "model.onnx").write_bytes(linear_image_onnx("image", "logits", noise=0.002))
    (target / "digits_base" / "1" / "model.py").write_text(LYING_SERVICE)
    image_bundle(target / "fides_verify" / "bundle")
    for key, value in parameters.items():
        for step in ("fides_verify", "fides_validate"):
            set_parameter(target / step / "config.pbtxt", f"fides.{key}", value)
    for mode in modes:
        add_mode(target, f"digits_{mode}", f"fides_validate_{mode}", mode=mode)
    return target


def add_mode(repository: Path, model: str, step: str, **parameters: str) -> None:
    """A further protected model over the same service and the same `fides_verify`, with other settings."""
    shutil.copytree(repository / "fides_validate", repository / step)
    for key, value in {"service_name": model, **parameters}.items():
        set_parameter(repository / step / "config.pbtxt", f"fides.{key}", value)
    shutil.copytree(repository / "digits__fides", repository / model)
    config = repository / model / "config.pbtxt"
    config.write_text(config.read_text().replace('"fides_validate"', f'"{step}"'))


STRANGER_CONFIG = """\
# Served since 2023; do not touch.
name: "flowers"
backend: "python"
max_batch_size: 16
version_policy { latest { num_versions: 1 } }
input [ { name: "pixels_in" data_type: TYPE_FP32 dims: [ 1, 8, 8 ] } ]
output [ { name: "scores" data_type: TYPE_FP32 dims: [ 10 ] label_filename: "flower_labels.txt" } ]
dynamic_batching { preferred_batch_size: [ 4, 8 ] max_queue_delay_microseconds: 100 }
model_warmup [ {
  name: "one" batch_size: 1
  inputs { key: "pixels_in" value { data_type: TYPE_FP32 dims: [ 1, 8, 8 ] zero_data: true } }
} ]
instance_group [ { kind: KIND_CPU count: 1 } ]
parameters { key: "delay_ms" value { string_value: "0" } }
"""

STRANGER_MODEL = """
import json, os, time
import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        here = os.path.join(args["model_repository"], args["model_version"])
        self.session = onnxruntime.InferenceSession(os.path.join(here, "net.onnx"), providers=["CPUExecutionProvider"])
        parameters = json.loads(args["model_config"])["parameters"]
        self.delay = float(parameters.get("delay_ms", {"string_value": "0"})["string_value"]) / 1000

    def execute(self, requests):
        responses = []
        for request in requests:
            pixels = pb_utils.get_input_tensor_by_name(request, "pixels_in").as_numpy()
            time.sleep(self.delay)
            scores = np.array(self.session.run(None, {"pixels_in": pixels})[0])
            attack = json.loads(request.parameters() or "{}").get("attack", "")
            for row in range(len(scores)) if attack == "all" else [int(r) for r in attack.split(",") if r]:
                a, b = np.argsort(scores[row])[-2:]
                scores[row, [a, b]] = scores[row, [b, a]]
            responses.append(pb_utils.InferenceResponse([pb_utils.Tensor("scores", scores)]))
        return responses
"""


def stranger_repository(folder: Path, config: str = STRANGER_CONFIG, model: str = "flowers") -> Path:
    """A repository as somebody built it who never heard of this package: `flowers`, version 3, with labels."""
    for version in ("1", "3"):
        (folder / model / version).mkdir(parents=True)
        (folder / model / version / "model.py").write_text(STRANGER_MODEL)
        (folder / model / version / "net.onnx").write_bytes(linear_image_onnx("pixels_in", "scores", noise=0.002))
    (folder / model / "config.pbtxt").write_text(config)
    (folder / model / "flower_labels.txt").write_text("".join(f"flower {i}\n" for i in range(N_CLASSES)))
    return folder


def tree_digest(folder: Path) -> str:
    """SHA-256 over every path, link target and byte below `folder`, Python's caches left out."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if "__pycache__" in path.parts:
            continue
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0")
        digest.update(f"{path.lstat().st_mode:o}".encode())
        if path.is_symlink():
            digest.update(os.readlink(path).encode())
        elif path.is_file():
            digest.update(path.read_bytes())
    return digest.hexdigest()


#: One model for every kind of input and output: it makes float images of whatever it gets and runs net.onnx.
KINDS_MODEL = """
import io, json, os
import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        here = os.path.join(args["model_repository"], args["model_version"])
        self.session = onnxruntime.InferenceSession(os.path.join(here, "net.onnx"), providers=["CPUExecutionProvider"])
        self.config = json.loads(args["model_config"])

    def pixels(self, array):
        if array.dtype == np.object_:
            from PIL import Image
            decoded = [np.asarray(Image.open(io.BytesIO(e)).convert("L"), np.float32) / 255 for e in array.ravel()]
            return np.stack(decoded)[:, None]
        return array.astype(np.float32).reshape(-1, 1, 8, 8)

    def execute(self, requests):
        responses = []
        for request in requests:
            array = pb_utils.get_input_tensor_by_name(request, "pixels_in").as_numpy()
            logits = self.session.run(None, {"pixels_in": self.pixels(array)})[0]
            exponent = np.exp(logits - logits.max(axis=1, keepdims=True))
            found = {
                "scores": logits,
                "shares": exponent / exponent.sum(axis=1, keepdims=True),
                "coarse_shares": np.round(exponent / exponent.sum(axis=1, keepdims=True), 3),
                "embedding": logits[:, :3],
                "half_scores": logits.astype(np.float16),
            }
            names = [o["name"] for o in self.config["output"]]
            flat = int(self.config["max_batch_size"]) == 0 and len(self.config["output"][0]["dims"]) == 1
            tensors = [pb_utils.Tensor(n, found[n][0] if flat else found[n]) for n in names]
            responses.append(pb_utils.InferenceResponse(tensors))
        return responses
"""


def kinds_model(repository: Path, name: str, max_batch_size: int, inputs: str, outputs: str) -> None:
    """Add a model with the given declarations to a repository."""
    (repository / name / "1").mkdir(parents=True)
    (repository / name / "1" / "model.py").write_text(KINDS_MODEL)
    (repository / name / "1" / "net.onnx").write_bytes(linear_image_onnx("pixels_in", "scores", noise=0.002))
    config = f'backend: "python"\nmax_batch_size: {max_batch_size}\ninput [ {inputs} ]\noutput [ {outputs} ]\n'
    (repository / name / "config.pbtxt").write_text(config + "instance_group [ { kind: KIND_CPU count: 1 } ]\n")
