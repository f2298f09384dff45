"""The runbook's way to withdraw the service alarm of a real TorchServe: workers scaled down and up."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest

from fides_plugins.launch.process import wait_until
from fides_plugins.launch.torchserve import TorchServeServer
from tests.support.torchserve_models import backdoor_bundle, body, protected_archive, rows

pytestmark = pytest.mark.integration


def test_scaled_workers_withdraw_the_alarm_until_the_next_attack(tmp_path: Path) -> None:
    backdoor_bundle(tmp_path / "bundle")
    (tmp_path / "store").mkdir()
    protected_archive(tmp_path / "store", "flag", tmp_path / "bundle", mode="flag")
    with TorchServeServer(tmp_path / "store", {"flag": "flag.mar"}, batch_size=1) as server:

        def alarmed() -> bool:
            # TorchServe has no such series until it has read the worker's first words.
            lines = httpx.get(server.metrics_url).text.splitlines()
            return any(float(x.split()[-1]) == 1.0 for x in lines if x.startswith("fides_under_attack{"))

        def attack() -> None:
            for row in rows(60, attacked=tuple(range(60))):
                httpx.post(f"{server.inference_url}/predictions/flag", content=json.dumps(body(row)), timeout=30)
            wait_until(alarmed, 20, "The alarm")

        assert not alarmed()
        attack()
        for workers in (0, 1):
            query = f"min_worker={workers}&max_worker={workers}&synchronous=true"
            assert httpx.put(f"{server.management_url}/models/flag?{query}", timeout=60).status_code == 200
        wait_until(lambda: not alarmed(), 10, "The withdrawn alarm")
        attack()
