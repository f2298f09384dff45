"""A real Prometheus scrapes a real protected Triton: silent while it is clean, alarmed when it is attacked.

Scrapes are two seconds apart here, as an operator's are fifteen; everything else is what is shipped in
`deploy/`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote
from urllib.request import urlopen

import numpy as np
import pytest
import tritonclient.grpc
from numpy.typing import NDArray

from fides_plugins.bundle import Bundle, Manifest, calibration_file, write_bundle
from fides_plugins.launch.process import HOST, Process, free_ports, wait_until
from fides_plugins.launch.triton import TritonServer, is_available
from fides_plugins.observation.metrics import METRICS
from fides_plugins.statistics.divergences import DIVERGENCES
from fides_plugins.testing import fake_logits
from fides_plugins.types import softmax
from tests.support.paths import REPOSITORY
from tests.support.triton_models import images, linear_image_onnx, template_repository

RULES = REPOSITORY / "deploy" / "prometheus" / "fides.rules.yml"
DASHBOARD = REPOSITORY / "deploy" / "grafana" / "fides.json"
SCRAPE_S = 2.0
EVALUATE_S = 0.5
CLEAN_REQUESTS = 20_000
CLIENTS = 4
ALERT = "FidesUnderAttack"

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="the Debian package prometheus is not installed"
)
needs_servers = pytest.mark.skipif(
    shutil.which("prometheus") is None or not is_available(),
    reason="the Debian package prometheus, or a Triton server for this platform, is not installed",
)
pytestmark = pytest.mark.integration


@needs_promtool
def test_rules_pass_their_own_tests() -> None:
    folder = RULES.parent
    for command in (
        ["check", "rules", "fides.rules.yml"],
        ["test", "rules", "fides.rules.test.yml"],
        ["check", "config", "prometheus.yml"],
    ):
        done = subprocess.run(["promtool", *command], cwd=folder, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr


def test_rules_and_dashboard_use_only_names_that_exist() -> None:
    rules = RULES.read_text()
    known = set(METRICS) | {f"{m.name}_bucket" for m in METRICS.values() if m.kind == "histogram"}
    # Steps, as values of a label of Triton's own metrics.
    known |= {"fides_verify", "fides_validate"}
    recorded = set(re.findall(r"record: (\S+)", rules))
    # The test file feeds the rules; what only appears there would be a rule over nothing.
    for text in (rules, *_expressions()):
        assert set(re.findall(r"\bfides_[a-z_]+", text)) <= known
        assert set(re.findall(r"\bfides:[a-z_:0-9]+", text)) <= recorded
    used = " ".join([rules, *_expressions()])
    assert {n for n in METRICS if n not in used} == set()


def _expressions() -> list[str]:
    return [t["expr"] for panel in json.loads(DASHBOARD.read_text())["panels"] for t in panel["targets"]]


def linear(array: NDArray[np.float32], noise: float) -> NDArray[np.float32]:
    """What the graph of `linear_image_onnx` answers."""
    from fides_plugins.onnx_model import OnnxModel

    return OnnxModel(linear_image_onnx("image", "logits", noise=noise)).run({"image": array})["logits"]


def calibrated_repository(folder: Path) -> Path:
    """The template, with a service that differs from the verification model as a teacher from its student.

    The calibration is that of this very pair on other rows, so that clean requests are exchangeable with it;
    a calibration that is too wide would keep any monitor silent.
    """
    repository = template_repository(folder / "repository", modes=("flag",))
    (repository / "digits_base" / "1" / "model.onnx").write_bytes(linear_image_onnx("image", "logits", noise=0.05))
    bundle = Bundle.load(repository / "fides_verify" / "bundle")
    rows = images(fake_logits(4000, seed=101))
    service, reference = softmax(linear(rows, 0.05)), softmax(linear(rows, 0.0))
    total_variation = np.clip(DIVERGENCES["total_variation"](service, reference), 0, 1)
    files = {name: bundle.file(name) for name in bundle.file_names}
    files["calibration.json"] = calibration_file({"learned": total_variation})
    fields = bundle.manifest.model_dump() | {"files": {}}
    fields["calibration"] |= {"n_rows": len(rows)}
    write_bundle(repository / "fides_verify" / "bundle", Manifest.model_validate(fields), files)
    return repository


@dataclass
class Prometheus:
    """A running Prometheus, asked over its HTTP API."""

    port: int

    def get(self, path: str) -> Any:
        with urlopen(f"http://{HOST}:{self.port}{path}", timeout=10) as answer:
            return json.load(answer)["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        return list(self.get(f"/api/v1/query?query={quote(expression)}")["result"])

    def value(self, expression: str) -> float:
        (result,) = self.query(expression)
        return float(result["value"][1])

    def firing(self, alert: str) -> bool:
        alerts = self.get("/api/v1/alerts")["alerts"]
        return any(a["labels"]["alertname"] == alert and a["state"] == "firing" for a in alerts)

    def scraped(self) -> bool:
        targets = self.get("/api/v1/targets")["activeTargets"]
        return bool(targets) and all(t["health"] == "up" for t in targets)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    repository = calibrated_repository(tmp_path_factory.mktemp("prometheus"))
    with TritonServer(repository, explicit=True, load=("digits_flag",), auto_complete=False) as running:
        yield running


@pytest.fixture(scope="module")
def prometheus(server: TritonServer) -> Iterator[Prometheus]:
    with watching(server) as found:
        yield found


@contextmanager
def watching(server: TritonServer) -> Iterator[Prometheus]:
    """A Prometheus with the shipped rules that scrapes this server."""
    (port,) = free_ports(1)
    process = Process("Prometheus", [])
    config = process.folder / "prometheus.yml"
    config.write_text(
        f"global: {{scrape_interval: {SCRAPE_S:g}s, evaluation_interval: {int(EVALUATE_S * 1000)}ms}}\n"
        f"rule_files: [{RULES}]\n"
        "scrape_configs:\n"
        "  - job_name: triton\n"
        f"    static_configs: [{{targets: ['{HOST}:{server.metrics_port}']}}]\n"
    )
    process.command = [
        "prometheus",
        f"--config.file={config}",
        f"--storage.tsdb.path={process.folder / 'data'}",
        f"--web.listen-address={HOST}:{port}",
    ]
    with process:
        found = Prometheus(port)
        process.wait_ready(found.scraped, 60)
        yield found


def send(server: TritonServer, n: int, seed: int, attack: str = "", until: Callable[[], bool] = lambda: False) -> int:
    """Up to n requests of one row, one after the other; the number that was answered."""
    array = images(fake_logits(n, seed=seed))
    with tritonclient.grpc.InferenceServerClient(server.grpc_address) as client:
        tensor = tritonclient.grpc.InferInput("image", [1, 1, 8, 8], "FP32")
        for i in range(n):
            if until():
                return i
            tensor.set_data_from_numpy(array[i : i + 1])
            client.infer("digits_flag", [tensor], parameters={"attack": attack} if attack else None)
    return n


@pytest.mark.slow
@needs_servers
def test_silent_while_clean_and_fires_within_two_scrapes_of_an_attack(
    server: TritonServer, prometheus: Prometheus
) -> None:
    start = time.monotonic()
    each = CLEAN_REQUESTS // CLIENTS
    with ThreadPoolExecutor(CLIENTS) as clients:
        sent = sum(clients.map(lambda seed: send(server, each, seed), range(200, 200 + CLIENTS)))
    seconds = time.monotonic() - start
    assert sent == CLEAN_REQUESTS
    counted = 'sum(fides_verdicts_total{model="digits_flag"})'
    wait_until(lambda: bool(prometheus.query(counted)) and prometheus.value(counted) == sent, 30, "the last scrape")
    flagged = prometheus.value('sum(fides_verdicts_total{model="digits_flag", status="attacked"})')
    # The clean requests are a real test of the alarm: they are flagged at about the false-alarm rate.
    assert 0.004 * sent < flagged < 0.02 * sent
    assert prometheus.value('fides_score_count{model="digits_flag"}') > 0.5 * sent
    assert prometheus.value('max_over_time(fides_under_attack{model="digits_flag"}[1h])') == 0.0
    assert prometheus.query(f'ALERTS{{alertname="{ALERT}"}}') == []
    assert not prometheus.query('last_over_time(ALERTS{alertname=~"Fides.*", alertstate="firing"}[1h])')

    stop = False
    with ThreadPoolExecutor(1) as clients:
        attacked_at = time.monotonic()
        attack = clients.submit(send, server, 5000, 300, "all", lambda: stop)
        try:
            wait_until(lambda: prometheus.firing(ALERT), 10 * SCRAPE_S, "the alert", poll_s=0.02)
            took = time.monotonic() - attacked_at
        finally:
            stop = True
        answered = attack.result()
    evidence = prometheus.value('fides_monitor_log_e_value{model="digits_flag"}')
    print(f"{sent} clean requests in {seconds:.0f} s, {flagged:.0f} flagged; alert {took:.2f} s after the attack began")
    print(f"{answered} attacked requests by then, log e-value {evidence:.1f}")
    assert took <= 2 * SCRAPE_S
    assert evidence >= 13.8


@needs_servers
def test_every_dashboard_query_runs_and_the_vocabulary_is_served(server: TritonServer, prometheus: Prometheus) -> None:
    send(server, 50, 400)
    counted = 'sum(fides_verdicts_total{model="digits_flag"})'
    wait_until(lambda: bool(prometheus.query(counted)) and prometheus.value(counted) >= 50, 30, "a scrape")
    optional = ("fides_audit_lines_total", "reclassify")
    for expression in _expressions():
        plain = expression.replace("$model", ".*").replace("$__rate_interval", "1m")
        result = prometheus.query(plain)
        assert result or any(name in plain for name in optional), plain
    text = server.api.metrics()
    for metric in METRICS.values():
        if metric.name in optional:
            continue
        series = re.findall(rf"^{metric.name}(?:_bucket)?\{{(.*?)\}} ", text, re.MULTILINE)
        assert series, metric.name
        for labels in series:
            assert set(metric.labels) <= {pair.partition("=")[0] for pair in labels.split(",")}
        assert f"# TYPE {metric.name} {metric.kind}" in text


@needs_servers
def test_a_dead_verification_is_noticed_although_nothing_counts_it(tmp_path: Path) -> None:
    """The rule waits a minute before it fires; that it is pending shows that it sees the real server's series.

    With servers of its own: the thousands of requests of the other tests would outnumber the failures.
    """
    options: dict[str, Any] = {"explicit": True, "load": ("digits_flag",), "auto_complete": False}
    with TritonServer(calibrated_repository(tmp_path), **options) as server, watching(server) as prometheus:

        def fails() -> bool:
            with pytest.raises(tritonclient.grpc.InferenceServerException, match="not healthy"):
                send(server, 1, 501)
            return True

        def pending(alert: str) -> bool:
            return bool(prometheus.query(f'ALERTS{{alertname="{alert}", model=~".*fides_verify"}}'))

        send(server, 5, 500)
        assert not pending("FidesStepFailing")
        for pid in server.stub_pids("fides_verify"):
            os.kill(pid, signal.SIGKILL)
        # Failures go on, so that several scrapes see them grow.
        wait_until(lambda: fails() and pending("FidesStepFailing"), 60, "The alert", poll_s=0.5)
        # Verdicts of the minutes before still stand in the window of this one; it comes when they have left it.
        assert not prometheus.firing("FidesVerificationFailing")
        assert prometheus.value('sum(fides:failures:increase5m{service="digits_flag"})') > 0
        server.api.reload("fides_verify")
        assert send(server, 1, 502) == 1


@needs_promtool
@needs_servers
def test_promtool_finds_nothing_to_say_about_our_metrics(server: TritonServer) -> None:
    text = server.api.metrics()
    done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True, timeout=60)
    assert [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("fides_")] == []
