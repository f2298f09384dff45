"""`model_repository/` as it lies in this repository: a real Triton loads it and answers real digits."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from fides_plugins.demo.digits import load_digits_split
from fides_plugins.launch.triton import TritonServer
from tests.support.paths import REPOSITORY

pytestmark = pytest.mark.integration

ROWS = 64


def test_it_runs_as_it_is(tmp_path: Path):
    # A copy, because Python writes its caches beside the models; nothing else is changed.
    shutil.copytree(REPOSITORY / "model_repository", tmp_path / "models")
    digits = load_digits_split(seed=0).test
    with TritonServer(tmp_path / "models") as server:
        images = {"image": digits.images[:ROWS]}
        bare = server.api.infer("digits_base", images)
        plain = server.api.infer("digits", images)
        judged = server.api.infer("digits__fides", images)
    assert set(plain) == {"logits"}
    assert plain["logits"].tobytes() == bare["logits"].tobytes()
    assert np.mean(judged["logits"].argmax(axis=1) == digits.labels[:ROWS]) > 0.95
    trusted = [s in (b"trusted", "trusted") for s in judged["FIDES_STATUS"].ravel()]
    assert np.mean(trusted) > 0.9
