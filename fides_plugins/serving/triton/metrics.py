"""Metrics on Triton's own endpoint, through the python backend's custom metrics.

Every update is a message to the server process (20 to 60 microseconds, measured), so updates wait in a
queue for a thread of their own: counters are summed and gauges overwritten meanwhile, and no request
waits for them. Processes of one server share the families: instances and models add to the same
counters and histograms. A gauge shows the value written last, so `fides_validate` should run as one
instance where the monitor's gauges matter.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray

from fides_plugins.observation.metrics import Metric

logger = logging.getLogger("fides_plugins")

#: Histogram values that may wait; beyond that some are left out (counters never are).
MAX_WAITING = 10_000
_FLUSH_S = 0.2

_Key = tuple[str, tuple[str, ...]]


class TritonMetrics:
    """A `fides_plugins.observation.metrics.MetricsBackend` over `pb_utils.MetricFamily`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._closing = False
        self._counts: dict[_Key, float] = {}
        self._values: dict[_Key, float] = {}
        self._observed: list[tuple[_Key, float]] = []
        self._known: dict[_Key, tuple[Metric, dict[str, str]]] = {}
        self._families: dict[str, Any] = {}
        self._metrics: dict[_Key, Any] = {}
        self._thread = threading.Thread(target=self._run, name="fides-metrics", daemon=True)
        self._thread.start()

    def increment(self, metric: Metric, labels: Mapping[str, str], amount: float) -> None:
        """Add to a counter, soon."""
        with self._lock:
            key = self._key(metric, labels)
            self._counts[key] = self._counts.get(key, 0.0) + amount
        self._wake.set()

    def set(self, metric: Metric, labels: Mapping[str, str], value: float) -> None:
        """Set a gauge, soon."""
        with self._lock:
            self._values[self._key(metric, labels)] = value
        self._wake.set()

    def observe(self, metric: Metric, labels: Mapping[str, str], values: NDArray[np.float64]) -> None:
        """Add values to a histogram, soon."""
        with self._lock:
            key = self._key(metric, labels)
            room = max(0, MAX_WAITING - len(self._observed))
            self._observed += [(key, value) for value in values[:room].tolist()]
        self._wake.set()

    def close(self) -> None:
        """Write what waits and stop."""
        self._closing = True
        self._wake.set()
        self._thread.join(timeout=2.0)

    def _key(self, metric: Metric, labels: Mapping[str, str]) -> _Key:
        key = (metric.name, tuple(labels.values()))
        if key not in self._known:
            self._known[key] = (metric, dict(labels))
        return key

    def _run(self) -> None:
        pause = threading.Event()
        while not self._closing:
            self._wake.wait()
            if not self._closing:
                # Under load this lets many updates become one message.
                pause.wait(_FLUSH_S)
            self._wake.clear()
            self._flush()

    def _flush(self) -> None:
        with self._lock:
            counts, self._counts = self._counts, {}
            values, self._values = self._values, {}
            observed, self._observed = self._observed, []
        try:
            for key, amount in counts.items():
                self._metric(key).increment(amount)
            for key, value in values.items():
                self._metric(key).set(value)
            for key, value in observed:
                self._metric(key).observe(value)
        except pb_utils.TritonModelException as error:
            # A server started without metrics: validation does not depend on them.
            logger.warning("metrics are not available: %s", error)
            self._closing = True

    def _metric(self, key: _Key) -> Any:
        if key not in self._metrics:
            metric, labels = self._known[key]
            if metric.name not in self._families:
                kind = getattr(pb_utils.MetricFamily, metric.kind.upper())
                self._families[metric.name] = pb_utils.MetricFamily(
                    name=metric.name, description=metric.help, kind=kind
                )
            extra = {"buckets": list(metric.buckets)} if metric.buckets else {}
            self._metrics[key] = self._families[metric.name].Metric(labels=labels, **extra)
        return self._metrics[key]
