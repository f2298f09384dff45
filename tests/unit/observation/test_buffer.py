"""The buffer between the recorder and a host's metric system, and the two hosts' writers."""

from __future__ import annotations

import sys
import threading
import types
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from fides_plugins.launch.process import wait_until
from fides_plugins.observation.buffer import MAX_WAITING, BufferedMetrics
from fides_plugins.observation.metrics import LOG_E_VALUE, SCORE, UNDER_ATTACK, VERDICTS, Metric
from fides_plugins.serving.torchserve.metrics import TorchServeMetrics
from fides_plugins.serving.triton.metrics import TritonMetrics

DIGITS = {"model": "digits"}
TRUSTED = {"model": "digits", "status": "trusted"}


class Writer:
    """Keeps what it is told; the names in `broken` raise."""

    def __init__(self, *broken: str) -> None:
        self.broken = set(broken)
        self.written: list[tuple[str, tuple[str, ...], float]] = []
        self.calls = 0

    def __call__(self, metric: Metric, labels: Mapping[str, str], value: float) -> None:
        self.calls += 1
        if metric.name in self.broken:
            raise RuntimeError("no metrics here")
        self.written.append((metric.name, tuple(labels.values()), value))


def test_counters_are_summed_gauges_overwritten_and_values_kept() -> None:
    buffer, writer = BufferedMetrics(), Writer()
    for amount in (1, 2, 3):
        buffer.increment(VERDICTS, TRUSTED, amount)
        buffer.set(UNDER_ATTACK, DIGITS, amount)
    buffer.increment(VERDICTS, {"model": "digits", "status": "attacked"}, 0)
    buffer.observe(SCORE, DIGITS, np.array([0.25, 0.5]))
    buffer.write_to(writer)
    buffer.close()
    assert sorted(writer.written) == [
        ("fides_score", ("digits",), 0.25),
        ("fides_score", ("digits",), 0.5),
        ("fides_under_attack", ("digits",), 3),
        ("fides_verdicts_total", ("digits", "attacked"), 0),
        ("fides_verdicts_total", ("digits", "trusted"), 6),
    ]


def test_updates_are_written_soon_and_by_a_thread_of_their_own() -> None:
    threads: list[str] = []
    buffer = BufferedMetrics()
    buffer.write_to(lambda metric, labels, value: threads.append(threading.current_thread().name))
    for _ in range(2):
        before = len(threads)
        buffer.increment(VERDICTS, TRUSTED, 1)
        wait_until(lambda before=before: len(threads) > before, 10, "The write")
    assert set(threads) == {"fides-metrics"}
    buffer.close()


def test_what_waits_is_bounded_and_counters_are_never_left_out() -> None:
    buffer, writer = BufferedMetrics(), Writer()
    for _ in range(3):
        buffer.observe(SCORE, DIGITS, np.full(MAX_WAITING - 1, 0.5))
        buffer.increment(VERDICTS, TRUSTED, 1)
    buffer.write_to(writer)
    buffer.close()
    assert sum(name == SCORE.name for name, _, _ in writer.written) == MAX_WAITING
    assert ("fides_verdicts_total", ("digits", "trusted"), 3) in writer.written


def test_a_metric_that_cannot_be_written_is_given_up_with_one_line(caplog: pytest.LogCaptureFixture) -> None:
    buffer, writer = BufferedMetrics(), Writer(SCORE.name)
    buffer.observe(SCORE, DIGITS, np.full(100, 0.5))
    buffer.set(LOG_E_VALUE, DIGITS, 1.0)
    buffer.write_to(writer)
    wait_until(lambda: bool(caplog.records), 10, "The log")
    buffer.observe(SCORE, DIGITS, np.full(100, 0.5))
    buffer.set(LOG_E_VALUE, DIGITS, 2.0)
    buffer.close()
    assert [value for _, _, value in writer.written] == [1.0, 2.0]
    assert writer.calls == 3
    assert [r.getMessage() for r in caplog.records] == [
        "metrics cannot be written: fides_score (RuntimeError: no metrics here)"
    ]


class Family:
    """Stands in for `pb_utils.MetricFamily`."""

    COUNTER, GAUGE, HISTOGRAM = "counter", "gauge", "histogram"
    made: list[dict[str, Any]]
    updates: list[tuple[Any, ...]]

    def __init__(self, **arguments: Any) -> None:
        self.made.append(arguments)
        self._name = arguments["name"]

    def Metric(self, **arguments: Any) -> Any:
        update = {
            kind: lambda value, kind=kind: self.updates.append((kind, self._name, arguments, value))
            for kind in ("increment", "set", "observe")
        }
        return types.SimpleNamespace(**update)


def test_triton_makes_each_family_once_and_speaks_its_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    family = type("MetricFamily", (Family,), {"made": [], "updates": []})
    monkeypatch.setitem(
        sys.modules,
        "triton_python_backend_utils",
        types.SimpleNamespace(MetricFamily=family),  # type: ignore[arg-type]
    )
    metrics = TritonMetrics()
    metrics.increment(VERDICTS, TRUSTED, 2)
    metrics.increment(VERDICTS, {"model": "digits", "status": "attacked"}, 1)
    metrics.set(UNDER_ATTACK, DIGITS, 1.0)
    metrics.observe(SCORE, DIGITS, np.array([0.5]))
    metrics.close()
    assert [(f["name"], f["kind"]) for f in family.made] == [(m.name, m.kind) for m in (VERDICTS, UNDER_ATTACK, SCORE)]
    buckets = {"labels": DIGITS, "buckets": list(SCORE.buckets)}
    assert ("increment", VERDICTS.name, {"labels": TRUSTED}, 2.0) in family.updates
    assert ("set", UNDER_ATTACK.name, {"labels": DIGITS}, 1.0) in family.updates
    assert ("observe", SCORE.name, buckets, 0.5) in family.updates


def test_a_triton_server_without_metrics_costs_no_answer(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Refused:
        COUNTER = "counter"

        def __init__(self, **arguments: Any) -> None:
            raise RuntimeError("metrics are disabled")

    monkeypatch.setitem(
        sys.modules,
        "triton_python_backend_utils",
        types.SimpleNamespace(MetricFamily=Refused),  # type: ignore[arg-type]
    )
    metrics = TritonMetrics()
    metrics.increment(VERDICTS, TRUSTED, 2)
    metrics.close()
    metrics.increment(VERDICTS, TRUSTED, 2)
    assert "metrics are disabled" in caplog.text


def test_torchserve_lines_carry_no_character_that_would_break_them() -> None:
    pytest.importorskip("ts", reason="the extra `torchserve` is not installed")
    lines: list[tuple[str, float, list[str], str]] = []

    class Metrics:
        def add_metric(self, name: str, value: float, unit: str, idx: None, dimensions: list[Any], kind: Any) -> None:
            lines.append((name, value, [str(d) for d in dimensions], kind.value))

    metrics = TorchServeMetrics()
    metrics.increment(VERDICTS, {"model": "di:gits,|#", "status": "trusted"}, 2)
    metrics.start(Metrics())
    metrics.close()
    assert lines == [(VERDICTS.name, 2.0, ["model:di_gits___", "status:trusted"], "counter")]
