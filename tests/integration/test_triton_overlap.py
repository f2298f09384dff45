"""Service and verification run at the same time, and the protected model costs little more than the bare one."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from fides_plugins.launch.triton import TritonServer, is_available
from fides_plugins.serving.triton.attach import attach
from fides_plugins.serving.triton.plan import AttachOptions
from fides_plugins.testing import fake_logits
from tests.support.triton_models import STRANGER_CONFIG, image_bundle, images, stranger_repository

pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(400),
    pytest.mark.skipif(not is_available(), reason="no Triton server for this platform"),
]

SERVICE_MS, VERIFICATION_MS = 20.0, 5.0
#: The other tests that run beside this one end, or come to a part that waits.
WAIT_FOR_A_CORE_S = 240.0

#: A verifier that computes for 5 ms and leaves the judgement to the built-in one.
SLOW_VERIFIER = f"""
import time
from fides_plugins import hookimpl


class Slow:
    @hookimpl
    def fides_verify(self, query):
        end = time.perf_counter() + {VERIFICATION_MS / 1000}
        while time.perf_counter() < end:
            pass
        return None
"""


def test_protected_latency_is_that_of_the_slower_branch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """p50 of the protected model is at most 1.15 times the bare one's plus 1 ms: 20 ms of service, 5 of verification.

    The service waits, as for a GPU; the verification computes, on its own core. Both are measured in turns,
    and rounds follow until one shows the bound: where other work takes every core, the service starts only
    when the verification lets go of its core. One after the other, they never show it.
    """
    (tmp_path / "slow_verifier.py").write_text(SLOW_VERIFIER)
    monkeypatch.syspath_prepend(str(tmp_path))
    repository = stranger_repository(
        tmp_path / "repository", STRANGER_CONFIG.replace('string_value: "0"', f'string_value: "{SERVICE_MS:g}"')
    )
    bundle = image_bundle(tmp_path / "bundle")
    attach(repository, "flowers", AttachOptions(bundle, settings={"plugins.load": "slow_verifier:Slow"}))
    # Triton's stub does not take PYTHONPATH over; a model's version folder is on its path.
    for part in ("verify", "validate", "fallback"):
        (repository / f"flowers__fides_{part}" / "1" / "slow_verifier.py").write_text(SLOW_VERIFIER)
    inputs = {"pixels_in": images(fake_logits(1))}
    with TritonServer(repository, config_name="fides", auto_complete=False) as server:
        api = server.api
        verify_ms = []
        for _ in range(10):
            start = time.perf_counter()
            api.infer("flowers__fides_verify", inputs)
            verify_ms.append(1e3 * (time.perf_counter() - start))
        assert np.median(verify_ms) > VERIFICATION_MS
        rounds = []
        deadline = time.monotonic() + WAIT_FOR_A_CORE_S
        while time.monotonic() < deadline:
            times: dict[str, list[float]] = {"flowers__base": [], "flowers": []}
            for _ in range(40):
                for model, found in times.items():
                    start = time.perf_counter()
                    api.infer(model, inputs)
                    found.append(1e3 * (time.perf_counter() - start))
            bare, protected = (float(np.median(found)) for found in times.values())
            assert bare > SERVICE_MS
            rounds.append((protected - (1.15 * bare + 1.0), bare, protected))
            if rounds[-1][0] <= 0:
                break
            time.sleep(2)
        assert min(rounds)[0] <= 0, rounds
