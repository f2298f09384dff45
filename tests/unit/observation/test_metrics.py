"""The vocabulary of metrics, and the recorder over a backend that a test can read."""

from __future__ import annotations

import math
import re
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from fides_plugins import hookimpl
from fides_plugins.launch.process import wait_until
from fides_plugins.observation.alarm import ServiceAlarm
from fides_plugins.observation.metrics import METRICS, Metric, MetricsRecorder
from fides_plugins.pipeline import Pipeline
from fides_plugins.protection import Protection
from fides_plugins.settings import Settings
from fides_plugins.statistics.monitor import SequenceMonitor
from fides_plugins.testing import fake_logits, fake_query, fake_service, make_bundle, switch_top_two
from fides_plugins.types import Prediction, Query, Verdict

REQUIRED = {
    "fides_verdicts_total": ("model", "status"),
    "fides_plugin_errors_total": ("model", "plugin"),
    "fides_score": ("model",),
    "fides_stage_seconds": ("model", "stage"),
    "fides_monitor_log_e_value": ("model",),
    "fides_under_attack": ("model",),
}


class Memory:
    """A backend that keeps what it is told."""

    def __init__(self) -> None:
        self.counters: Counter[tuple[str, ...]] = Counter()
        self.gauges: dict[tuple[str, ...], float] = {}
        self.observed: dict[tuple[str, ...], list[float]] = {}

    @staticmethod
    def key(metric: Metric, labels: Mapping[str, str], kind: str) -> tuple[str, ...]:
        assert METRICS[metric.name] is metric
        assert metric.kind == kind
        assert tuple(labels) == metric.labels
        return (metric.name, *labels.values())

    def increment(self, metric: Metric, labels: Mapping[str, str], amount: float) -> None:
        assert amount >= 0
        self.counters[self.key(metric, labels, "counter")] += amount  # type: ignore[assignment]

    def set(self, metric: Metric, labels: Mapping[str, str], value: float) -> None:
        self.gauges[self.key(metric, labels, "gauge")] = value

    def observe(self, metric: Metric, labels: Mapping[str, str], values: NDArray[np.float64]) -> None:
        self.observed.setdefault(self.key(metric, labels, "histogram"), []).extend(values.tolist())


class Broken:
    """A backend whose server is gone."""

    def increment(self, metric: Metric, labels: Mapping[str, str], amount: float) -> None:
        raise ConnectionError("gone")

    set = observe = increment  # type: ignore[assignment]


class Raises:
    @hookimpl
    def fides_record(self) -> None:
        raise RuntimeError("boom")


class Log:
    line_counts: Mapping[str, int] = {"written": 3, "dropped": 1}

    @hookimpl
    def fides_record(self) -> None: ...


def protected(tmp_path: Path, recorder: MetricsRecorder, **plugins: object) -> Protection:
    make_bundle(tmp_path / "bundle")
    settings = Settings(bundle="bundle", false_alarm_rate=0.02, timeout_ms=500, output_kind="probabilities")
    return Protection(settings, Pipeline.from_settings(settings, tmp_path, plugins), recorder=recorder)


def judged(protection: Protection, query: Query, service: Prediction) -> Verdict:
    return protection.judge(query, service.probabilities, protection.verify(query))


def test_names_labels_and_buckets() -> None:
    assert {n: METRICS[n].labels for n in REQUIRED} == REQUIRED
    for metric in METRICS.values():
        assert re.fullmatch(r"fides_[a-z_]+", metric.name)
        assert metric.help.endswith(".")
        assert metric.labels[0] == "model"
        assert (metric.kind == "counter") == metric.name.endswith("_total")
        assert (metric.kind == "histogram") == bool(metric.buckets)
        assert list(metric.buckets) == sorted(set(metric.buckets))


def test_counts_add_up(tmp_path: Path) -> None:
    memory = Memory()
    protection = protected(tmp_path, MetricsRecorder(memory, "digits"))
    assert memory.counters[("fides_verdicts_total", "digits", "attacked")] == 0
    assert ("fides_verdicts_total", "digits", "attacked") in memory.counters
    assert memory.gauges[("fides_false_alarm_rate", "digits")] == 0.02
    assert memory.gauges[("fides_timeout_seconds", "digits")] == 0.5

    logits = fake_logits(8)
    honest = fake_service(logits)
    lie = Prediction(switch_top_two(honest.probabilities, [1, 5]), honest.valid)
    judged(protection, fake_query(logits), lie)
    judged(protection, fake_query(logits), honest)

    by_status = {k[2]: v for k, v in memory.counters.items() if k[0] == "fides_verdicts_total"}
    assert by_status == {"trusted": 14, "attacked": 2, "indeterminate": 0, "error": 0}
    assert len(memory.observed[("fides_score", "digits")]) == 16
    for stage, calls in (("verify", 2), ("detect", 2), ("reclassify", 1)):
        seconds = memory.observed[("fides_stage_seconds", "digits", stage)]
        assert len(seconds) == calls
        assert all(0 < s < 5 for s in seconds)


def test_the_service_alarm_feeds_the_gauges(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    memory = Memory()
    recorder = MetricsRecorder(memory, "digits")
    protection = protected(tmp_path, recorder)
    raised, evidence = ("fides_under_attack", "digits"), ("fides_monitor_log_e_value", "digits")
    # A new process says at once that it is quiet: it may have taken the place of an alarmed one.
    assert (memory.gauges[raised], memory.gauges[evidence]) == (0.0, 0.0)
    # Benign traffic exchangeable with the fake bundle's calibration rows.
    logits = fake_logits(300, seed=17)
    judged(protection, fake_query(logits), fake_service(logits, seed=18))
    wait_until(lambda: memory.gauges[evidence] != 0.0, 10, "The gauge")
    assert memory.gauges[raised] == 0.0
    assert memory.gauges[evidence] < 5.0

    logits = fake_logits(60, seed=19)
    honest = fake_service(logits, seed=20)
    lie = Prediction(switch_top_two(honest.probabilities), honest.valid)
    judged(protection, fake_query(logits, request_ids=tuple(f"r{i}" for i in range(60))), lie)
    wait_until(lambda: memory.gauges[raised] == 1.0, 10, "The gauge")
    assert memory.gauges[evidence] >= -math.log(protection.settings.monitor_error)
    assert "'digits' is under attack" in caplog.text
    assert ", request r" in caplog.text

    assert recorder.alarm is not None
    recorder.alarm.reset()
    wait_until(lambda: memory.gauges[raised] == 0.0, 10, "The gauge")
    protection.close()


def test_a_request_id_cannot_forge_a_line_of_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    memory = Memory()
    protection = protected(tmp_path, MetricsRecorder(memory, "digits"))
    logits = fake_logits(60, seed=19)
    honest = fake_service(logits, seed=20)
    lie = Prediction(switch_top_two(honest.probabilities), honest.valid)
    forged = "r\nERROR the service 'other' is under attack\x1b[2J" + "x" * 10_000
    judged(protection, fake_query(logits, request_ids=(forged,) * 60), lie)
    wait_until(lambda: "under attack" in caplog.text, 10, "The alarm")
    protection.close()
    (line,) = [r.getMessage() for r in caplog.records if "under attack" in r.getMessage()]
    assert line.isprintable()
    assert len(line) < 300


def test_two_processes_share_a_gauge_and_the_alarm_stays(tmp_path: Path) -> None:
    """The one that sees nothing does not withdraw the other one's alarm."""
    memory = Memory()
    attacked = MetricsRecorder(memory, "digits", alarm=False)
    quiet = MetricsRecorder(memory, "digits", alarm=False)
    quiet._publish_alarm(0.0, False)
    attacked._publish_alarm(20.0, True)
    quiet._publish_alarm(0.0, False)
    assert memory.gauges[("fides_under_attack", "digits")] == 1.0


def test_the_alarm_never_blocks_and_counts_what_it_leaves_out() -> None:
    alarm = ServiceAlarm(SequenceMonitor(999), "digits", lambda log_e, raised: None)
    start = time.monotonic()
    for _ in range(100):
        alarm.put(np.full(1000, 0.5, np.float32))
    assert time.monotonic() - start < 1.0
    alarm.put(np.zeros(1, np.float32))
    assert alarm.left_out >= 50_000
    alarm.close()


def test_a_p_value_of_zero_does_not_keep_its_batch_from_the_alarm() -> None:
    """A plug-in's p-value may be 0; the batch that held one was once left out, and the attack with it."""
    states: list[bool] = []
    alarm = ServiceAlarm(SequenceMonitor(999), "digits", lambda log_e, raised: states.append(raised))
    alarm.put(np.array([0.0] + [0.001] * 7, np.float32))
    wait_until(lambda: bool(states), 10, "The alarm")
    alarm.close()
    assert states == [True]


def test_an_alarm_that_fails_says_so_and_counts_the_rows(caplog: pytest.LogCaptureFixture) -> None:
    def fail(log_e: float, raised: bool) -> None:
        raise RuntimeError("boom")

    alarm = ServiceAlarm(SequenceMonitor(999), "digits", fail)
    alarm.put(np.full(3, 0.5, np.float32))
    wait_until(lambda: "no longer tested" in caplog.text, 10, "The log")
    alarm.close()
    alarm.put(np.full(5, 0.5, np.float32))
    assert alarm.left_out == 5
    assert "boom" in caplog.text


def test_rows_without_a_score_are_counted_but_not_observed(tmp_path: Path) -> None:
    memory = Memory()
    protection = protected(tmp_path, MetricsRecorder(memory, "digits"))
    protection.unjudged(8, "no service output")
    assert memory.counters[("fides_verdicts_total", "digits", "error")] == 8
    assert ("fides_score", "digits") not in memory.observed


def test_plugin_errors_and_log_lines_are_counted_once(tmp_path: Path) -> None:
    memory = Memory()
    recorder = MetricsRecorder(memory, "digits")
    protection = protected(tmp_path, recorder, raises=Raises(), log=Log())
    logits = fake_logits(2)
    for _ in range(3):
        judged(protection, fake_query(logits), fake_service(logits))
    recorder.refresh()
    recorder.refresh()
    assert memory.counters[("fides_plugin_errors_total", "digits", "raises")] == 3
    assert memory.counters[("fides_plugin_errors_total", "digits", "log")] == 0
    assert memory.counters[("fides_audit_lines_total", "digits", "written")] == 3
    assert memory.counters[("fides_audit_lines_total", "digits", "dropped")] == 1


def test_a_broken_backend_never_reaches_the_serving_path(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    recorder = MetricsRecorder(Broken(), "digits", alarm=False)
    protection = protected(tmp_path, recorder)
    logits = fake_logits(4)
    verdict = judged(protection, fake_query(logits), fake_service(logits))
    assert verdict.counts()["trusted"] == 4
    assert recorder.failures > 4
    assert sum("cannot be updated" in r.message for r in caplog.records) == 1
