"""The contract of hosts (`fides_plugins.testing.check_host`), through a real Triton and a real TorchServe."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import numpy as np
import pytest

from fides_plugins.launch.torchserve import TorchServeServer
from fides_plugins.launch.triton import TritonServer, is_available
from fides_plugins.serving.torchserve.attach import attach as attach_archive
from fides_plugins.serving.torchserve.build import build_archive
from fides_plugins.serving.triton.attach import attach
from fides_plugins.serving.triton.operator.api import InferenceRefused
from fides_plugins.serving.triton.plan import AttachOptions
from fides_plugins.testing import INPUT_NAME, Answered, HostCase, check_host, host_cases, make_bundle
from fides_plugins.types import Float32Array

pytestmark = pytest.mark.integration

CASES = list(host_cases())
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)

TRITON_SERVICE = f"""
import triton_python_backend_utils as pb_utils
from fides_plugins.testing import host_cases

class TritonPythonModel:
    def initialize(self, args):
        (self.case,) = [c for c in host_cases() if args["model_name"] == c.name + "__base"]

    def execute(self, requests):
        inputs = [pb_utils.get_input_tensor_by_name(r, "{INPUT_NAME}").as_numpy() for r in requests]
        outputs = [pb_utils.Tensor("scores", self.case.service(x)) for x in inputs]
        return [pb_utils.InferenceResponse([tensor]) for tensor in outputs]
"""
TYPES = {"float16": "FP16", "float32": "FP32", "float64": "FP64"}

TORCHSERVE_SERVICE = """
import json
import numpy as np
from fides_plugins.testing import host_cases

class Handler:
    def initialize(self, context):
        (self.case,) = [c for c in host_cases() if context.model_name == c.name]
        self.initialized = True

    def inference(self, rows):
        return self.case.service(rows)

    def handle(self, data, context):
        bodies = [item.get("body") or item.get("data") for item in data]
        rows = [json.loads(b) if isinstance(b, (bytes, bytearray)) else b for b in bodies]
        return [row.tobytes() for row in self.inference(np.asarray(rows, np.float32))]
"""


def settings_text(case: HostCase) -> dict[str, str]:
    return {
        "mode": case.settings.mode,
        "on_error": case.settings.on_error,
        "plugins.load": ",".join(case.settings.plugins.load),
    }


@pytest.fixture(scope="module")
def triton(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    if not is_available():
        pytest.skip("no Triton server for this platform")
    root = tmp_path_factory.mktemp("triton")
    repository = root / "repository"
    for case in CASES:
        folder = repository / case.name
        (folder / "1").mkdir(parents=True)
        (folder / "1" / "model.py").write_text(TRITON_SERVICE)
        axes = ", ".join(map(str, case.shape))
        (folder / "config.pbtxt").write_text(
            'backend: "python"\nmax_batch_size: 0\n'
            f'input [ {{ name: "{INPUT_NAME}" data_type: TYPE_FP32 dims: [ -1, 10 ] }} ]\n'
            f'output [ {{ name: "scores" data_type: TYPE_{TYPES[case.dtype]} dims: [ -1, {axes} ] }} ]\n'
        )
        make_bundle(root / f"{case.name}_bundle", **case.bundle_options())
        attach(repository, case.name, AttachOptions(root / f"{case.name}_bundle", settings=settings_text(case)))
    loaded = [f"{case.name}{part}" for case in CASES for part in ("__base", "__fides")]
    with TritonServer(
        repository, explicit=True, load=loaded, config_name="fides", auto_complete=False, env={"OMP_NUM_THREADS": "1"}
    ) as running:
        yield running


@every_case
def test_triton_keeps_the_contract(triton: TritonServer, case: HostCase) -> None:
    def ask(rows: Float32Array) -> Answered:
        try:
            found = triton.api.infer(f"{case.name}__fides", {INPUT_NAME: rows})
        except InferenceRefused:
            return Answered((), None)
        return Answered(tuple(s.decode() for s in found["FIDES_STATUS"].ravel()), found["scores"])

    check_host(case, ask)


@pytest.fixture(scope="module")
def torchserve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TorchServeServer]:
    root = tmp_path_factory.mktemp("torchserve")
    (root / "served").mkdir()
    for case in CASES:
        make_bundle(root / f"{case.name}_bundle", **case.bundle_options())
        plain = root / f"{case.name}.mar"
        config = "minWorkers: 1\nmaxWorkers: 1\n"
        build_archive(plain, "service.py", {"service.py": TORCHSERVE_SERVICE}, config=config)
        attach_archive(
            plain,
            root / f"{case.name}_bundle",
            root / "served" / plain.name,
            dict(case.settings.model_dump(exclude_unset=True)),
        )
    with TorchServeServer(root / "served", {c.name: f"{c.name}.mar" for c in CASES}) as running:
        yield running


@every_case
def test_torchserve_keeps_the_contract(torchserve: TorchServeServer, case: HostCase) -> None:
    def ask(rows: Float32Array) -> Answered:
        answer = httpx.post(f"{torchserve.inference_url}/predictions/{case.name}", json=rows[0].tolist(), timeout=30)
        if answer.status_code != 200:
            assert answer.status_code in (409, 503)
            return Answered((), None)
        status = answer.headers.get("x-fides-status")
        return Answered(() if status is None else (status,), np.frombuffer(answer.content, case.dtype))

    check_host(case, ask, one_row=True)
