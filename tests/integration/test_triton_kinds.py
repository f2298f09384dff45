"""Every kind of input and output that attach takes, through a real Triton."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fides_plugins.launch.triton import TritonServer, is_available
from fides_plugins.serving.triton.attach import attach
from fides_plugins.serving.triton.operator.check import check
from fides_plugins.serving.triton.plan import AttachOptions
from fides_plugins.testing import fake_logits
from tests.support.triton_models import image_bundle, images, kinds_model

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(not is_available(), reason="no Triton server for this platform"),
]

SCORES = '{ name: "scores" data_type: TYPE_FP32 dims: [ 10 ] }'
DECODER = "image:size=8x8,mode=L,layout=NCHW,scale=255"


def pixels(dtype: str, dims: str = "1, 8, 8") -> str:
    return f'{{ name: "pixels_in" data_type: TYPE_{dtype} dims: [ {dims} ] }}'


def png() -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(5).integers(0, 256, (8, 8), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


FLOATS = images(fake_logits(3, seed=21))
INTEGERS = np.random.default_rng(6).integers(0, 3, (3, 1, 8, 8))
MASK = '{ name: "mask" data_type: TYPE_INT32 dims: [ 1 ] optional: true }'
TWO = '{ name: "embedding" data_type: TYPE_FP32 dims: [ 3 ] }, { name: "shares" data_type: TYPE_FP32 dims: [ 10 ] }'

#: name: max_batch_size, inputs, outputs, array, attach options
KINDS: dict[str, tuple[int, str, str, Any, dict[str, Any]]] = {
    "fp16": (8, pixels("FP16"), SCORES, FLOATS.astype(np.float16), {}),
    "int8": (8, pixels("INT8"), SCORES, INTEGERS.astype(np.int8), {}),
    "int16": (8, pixels("INT16"), SCORES, INTEGERS.astype(np.int16), {}),
    "int32": (8, pixels("INT32"), SCORES, INTEGERS.astype(np.int32), {}),
    "int64": (8, pixels("INT64"), SCORES, INTEGERS.astype(np.int64), {}),
    "uint8": (8, pixels("UINT8"), SCORES, INTEGERS.astype(np.uint8), {}),
    "bytes": (8, pixels("STRING", "1"), SCORES, np.array([[png()]] * 3, dtype=np.object_), {"decode": DECODER}),
    "free_axes": (8, pixels("FP32", "1, -1, -1"), '{ name: "scores" data_type: TYPE_FP32 dims: [ -1 ] }', FLOATS, {}),
    "rows_of_its_own": (
        0,
        pixels("FP32", "-1, 1, 8, 8"),
        '{ name: "scores" data_type: TYPE_FP32 dims: [ -1, 10 ] }',
        FLOATS,
        {},
    ),
    "one_row": (0, pixels("FP32"), SCORES, FLOATS[0], {}),
    "several": (8, pixels("FP32") + ", " + MASK, TWO, FLOATS, {"input": "pixels_in", "output_kind": "probabilities"}),
    "coarse": (
        8,
        pixels("FP32"),
        '{ name: "coarse_shares" data_type: TYPE_FP32 dims: [ 10 ] }',
        FLOATS,
        {"output_kind": "probabilities"},
    ),
    "half_scores": (8, pixels("FP32"), '{ name: "half_scores" data_type: TYPE_FP16 dims: [ 10 ] }', FLOATS, {}),
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    root = tmp_path_factory.mktemp("kinds")
    repository = root / "repository"
    bundle = image_bundle(root / "bundle")
    for name, (batch, inputs, outputs, _, options) in KINDS.items():
        kinds_model(repository, name, batch, inputs, outputs)
        attach(repository, name, AttachOptions(bundle, settings={"mode": "flag"}, **options))

    loaded = [f"{n}{part}" for n in KINDS for part in ("__base", "__fides")]
    with TritonServer(
        repository, explicit=True, load=loaded, config_name="fides", auto_complete=False, env={"OMP_NUM_THREADS": "1"}
    ) as running:
        yield running


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_the_answer_is_the_services_own_and_is_judged(server: TritonServer, kind: str, tmp_path: Path) -> None:
    *_, array, _ = KINDS[kind]
    bare = server.api.infer(f"{kind}__base", {"pixels_in": array})
    found = server.api.infer(f"{kind}__fides", {"pixels_in": array})
    for name, value in bare.items():
        assert found[name].dtype == value.dtype
        assert found[name].tobytes() == value.tobytes()
    rows = 1 if kind == "one_row" else 3
    assert [s.decode() for s in found["FIDES_STATUS"].ravel()] == ["trusted"] * rows
    assert np.isfinite(found["FIDES_SCORE"]).all()
    assert found["FIDES_PROBABILITIES"].shape == ((10,) if kind == "one_row" else (3, 10))


def test_an_empty_batch_of_a_model_with_rows_of_its_own(server: TritonServer) -> None:
    found = server.api.infer("rows_of_its_own__fides", {"pixels_in": FLOATS[:0]})
    assert found["scores"].shape == (0, 10)
    assert found["FIDES_STATUS"].shape == (0,)


def test_bytes_that_are_no_image_are_an_error_of_the_request(server: TritonServer) -> None:
    from fides_plugins.serving.triton.operator.api import InferenceRefused

    junk = np.array([[b"no image"]], dtype=np.object_)
    with pytest.raises(InferenceRefused):
        # The service cannot decode it either; the ensemble answers with the service's own error.
        server.api.infer("bytes__fides", {"pixels_in": junk})
    good = server.api.infer("bytes__fides", {"pixels_in": KINDS["bytes"][3]})
    assert good["FIDES_STATUS"][0, 0] == b"trusted"


@pytest.mark.parametrize("kind", ["uint8", "several", "one_row", "rows_of_its_own"])
def test_check_finds_nothing_wrong(server: TritonServer, kind: str) -> None:
    findings = check(server.api, f"{kind}__fides")
    assert [f.what for f in findings if not f.good] == []
    assert {"verification", "validation", "service model", "/dev/shm"} <= {f.what for f in findings}


def test_check_tells_that_answers_are_written_coarsely(server: TritonServer) -> None:
    rows = images(fake_logits(8, seed=2, margin=0.5))
    findings = check(server.api, "coarse__fides", {"pixels_in": rows})
    assert "written coarsely: 3 decimals" in [f.detail for f in findings]
    assert all(f.what != "answers" for f in check(server.api, "several__fides", {"pixels_in": rows}))
