"""Metrics through TorchServe's own endpoint, under the same names as on Triton.

TorchServe shows them only with these two lines in config.properties:

    metrics_mode=prometheus
    model_metrics_auto_detect=true

Each value is a line that the worker writes and the frontend parses (about 0.1 ms of the worker's time),
so updates wait for a thread of their own: counters are summed and gauges overwritten meanwhile, and no
answer waits for them. Buckets of histograms are TorchServe's own.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fides_plugins.observation.metrics import Metric

logger = logging.getLogger("fides_plugins")

#: Histogram values that may wait; beyond that the oldest are left out (counters never are).
MAX_WAITING = 10_000
_FLUSH_S = 0.2

_Key = tuple[str, tuple[tuple[str, str], ...]]


class TorchServeMetrics:
    """A `MetricsBackend` over `context.metrics`."""

    def __init__(self) -> None:
        from ts.metrics.dimension import Dimension
        from ts.metrics.metric_type_enum import MetricTypes

        self._dimension = Dimension
        self._kinds = {
            "counter": MetricTypes.COUNTER,
            "gauge": MetricTypes.GAUGE,
            "histogram": MetricTypes.HISTOGRAM,
        }
        self._lock = threading.Lock()
        self._sums: dict[_Key, tuple[Metric, float]] = {}
        self._waiting: deque[tuple[_Key, Metric, float]] = deque(maxlen=MAX_WAITING)
        self._wake = threading.Event()

    def increment(self, metric: Metric, labels: Mapping[str, str], amount: float) -> None:
        """Add to a counter."""
        key = _key(metric, labels)
        with self._lock:
            self._sums[key] = (metric, self._sums.get(key, (metric, 0.0))[1] + amount)
        self._wake.set()

    def set(self, metric: Metric, labels: Mapping[str, str], value: float) -> None:
        """Set a gauge."""
        with self._lock:
            self._sums[_key(metric, labels)] = (metric, value)
        self._wake.set()

    def observe(self, metric: Metric, labels: Mapping[str, str], values: NDArray[np.float64]) -> None:
        """Add (n,) values to a histogram; each is a line of its own."""
        key = _key(metric, labels)
        self._waiting.extend((key, metric, float(v)) for v in values)
        self._wake.set()

    def start(self, metrics: Any) -> None:
        """Write to `metrics`, the worker's `context.metrics`, from now until the worker ends."""
        threading.Thread(target=self._run, args=(metrics,), name="fides-metrics", daemon=True).start()

    def flush(self, metrics: Any) -> None:
        """Write what has gathered. A failure is logged and changes nothing."""
        with self._lock:
            sums, self._sums = self._sums, {}
            waiting = [self._waiting.popleft() for _ in range(len(self._waiting))]
        try:
            for key, (metric, value) in sums.items():
                self._write(metrics, metric, key, value)
            for key, metric, value in waiting:
                self._write(metrics, metric, key, value)
        except Exception:  # host boundary: metrics must never cost an answer
            logger.exception("metrics cannot be written")

    def _run(self, metrics: Any) -> None:
        pause = threading.Event()
        while True:
            self._wake.wait()
            pause.wait(_FLUSH_S)
            self._wake.clear()
            self.flush(metrics)

    def _write(self, metrics: Any, metric: Metric, key: _Key, value: float) -> None:
        # A fresh list each time: TorchServe appends its own dimensions to it.
        dimensions = [self._dimension(name, text) for name, text in key[1]]
        metrics.add_metric(metric.name, round(value, 7), "count", None, dimensions, self._kinds[metric.kind])


def _key(metric: Metric, labels: Mapping[str, str]) -> _Key:
    return metric.name, tuple((name, _label(text)) for name, text in labels.items())


def _label(text: str) -> str:
    """Dimensions travel in a line of `name:value,name:value|`, so these characters cannot."""
    return "".join(c if (c.isascii() and c.isalnum()) or c in "_-. " else "_" for c in text)[:100]
