"""The runbook's way to withdraw the service alarm of a real TorchServe: workers scaled down and up."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest

from fides_plugins.launch.process import wait_until
from fides_plugins.launch.torchserve import TorchServeServer
from fides_plugins.serving.torchserve.check import check
from tests.support.torchserve_models import backdoor_bundle, body, protected_archive, rows

pytestmark = pytest.mark.integration


def test_scaled_workers_withdraw_the_alarm_until_the_next_attack(tmp_path: Path) -> None:
    backdoor_bundle(tmp_path / "bundle")
    (tmp_path / "store").mkdir()
    protected_archive(tmp_path / "store", "flag", tmp_path / "bundle", mode="flag")
    api = {"enable_model_api": "true"}
    with TorchServeServer(tmp_path / "store", {"flag": "flag.mar"}, batch_size=1, properties=api) as server:

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
        # TorchServe has no word for taking a value away, and kills the workers of a model that goes: its alarm stays
        # on the page, `fides check` says that it is of the past, and registering the model again withdraws it.
        assert httpx.delete(f"{server.management_url}/models/flag/1.0", timeout=60).status_code == 200
        assert alarmed()
        (workers, *_) = check(
            server.inference_url, "flag", b"{}", management_url=server.management_url, metrics_url=server.metrics_url
        )
        assert workers.detail == "no model 'flag' is registered; its metrics are of the past"
        query = "url=flag.mar&model_name=flag&initial_workers=1&synchronous=true"
        assert httpx.post(f"{server.management_url}/models?{query}", timeout=60).status_code == 200
        wait_until(lambda: not alarmed(), 10, "The withdrawn alarm")
        attack()
        for count in (0, 1):
            query = f"min_worker={count}&max_worker={count}&synchronous=true"
            assert httpx.put(f"{server.management_url}/models/flag?{query}", timeout=60).status_code == 200
        wait_until(lambda: not alarmed(), 10, "The withdrawn alarm")
        attack()
