"""Five thousand requests, a tenth of them malformed, from eight clients at once."""

from __future__ import annotations

import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from fides_plugins.launch.process import wait_until
from fides_plugins.launch.torchserve import TorchServeServer
from tests.support.torchserve_models import backdoor_bundle, body, protected_archive, rows

pytestmark = [pytest.mark.integration, pytest.mark.slow]

REQUESTS = 5000
CLIENTS = 8


def test_counts_add_up_and_no_worker_dies(tmp_path: Path) -> None:
    backdoor_bundle(tmp_path / "bundle")
    config = "minWorkers: 2\nmaxWorkers: 2\nbatchSize: 8\nmaxBatchDelay: 5\n"
    protected_archive(tmp_path, "digits", tmp_path / "bundle", "robust", mode="reject", config=config)
    x = rows(100, seed=21, attacked=tuple(range(1, 100, 5)))
    bodies = [body(row) for row in x]
    malformed = ({"x": [1.0]}, {"y": 1}, {"x": "text"}, {"x": [[0.0]]})
    kinds = ["malformed" if i % 10 == 3 else "attacked" if i % 5 == 1 else "honest" for i in range(REQUESTS)]
    expected = {"malformed": 400, "attacked": 409, "honest": 200}

    with TorchServeServer(tmp_path, {"digits": "digits.mar"}) as server:
        before = server.workers("digits")
        assert len(before) == 2
        url = f"{server.inference_url}/predictions/digits"

        def client(number: int) -> Counter[tuple[str, int, str]]:
            seen: Counter[tuple[str, int, str]] = Counter()
            with httpx.Client(timeout=30) as session:
                for i in range(number, REQUESTS, CLIENTS):
                    content = malformed[i % 4] if kinds[i] == "malformed" else bodies[i % 100]
                    answer = session.post(url, json=content)
                    seen[kinds[i], answer.status_code, answer.headers["x-fides-status"]] += 1
            return seen

        with ThreadPoolExecutor(CLIENTS) as pool:
            seen = sum(pool.map(client, range(CLIENTS)), Counter())

        assert sum(seen.values()) == REQUESTS
        statuses = {"malformed": "indeterminate", "attacked": "attacked", "honest": "trusted"}
        assert seen == {(k, expected[k], statuses[k]): n for k, n in Counter(kinds).items()}
        assert server.workers("digits") == before

        def counted() -> Counter[str]:
            page = httpx.get(server.metrics_url, timeout=10).text
            lines = re.findall(r'^fides_verdicts_total{[^}]*status="(\w+)"[^}]*} ([0-9.E]+)$', page, re.MULTILINE)
            totals: Counter[str] = Counter()
            for status, value in lines:
                totals[status] += round(float(value))
            return totals

        # Metrics travel through the worker's log, which may still be read.
        wait_until(lambda: sum(counted().values()) >= REQUESTS, 30, "the metrics")
        totals = counted()
        assert sum(totals.values()) == REQUESTS
        assert totals["attacked"] == Counter(kinds)["attacked"]
