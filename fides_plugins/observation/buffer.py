"""Updates of metrics wait here for a thread of their own, so that no answer waits for them.

On every host one update is a message to another process (20 to 100 microseconds). Until the next round
counters are summed and gauges overwritten, so that many updates become one message.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from fides_plugins.observation.metrics import Metric

logger = logging.getLogger("fides_plugins")

#: Histogram values that may wait; beyond that some are left out. Counters and gauges never are.
MAX_WAITING = 10_000
_ROUND_S = 0.2
_CLOSE_S = 2.0

#: One message to the host: adds to a counter, sets a gauge, or adds one value to a histogram.
Write = Callable[[Metric, Mapping[str, str], float], None]
_Key = tuple[Metric, tuple[tuple[str, str], ...]]


class BufferedMetrics:
    """A `MetricsBackend` that any thread may use; `write_to` says where the updates go.

    A metric whose write raises is given up, with a line in the log: a server that was started without
    metrics, or that has another metric of that name, would refuse each further update as well.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._latest: dict[_Key, float] = {}
        self._observed: list[tuple[_Key, float]] = []
        self._given_up: set[str] = set()
        self._thread: threading.Thread | None = None

    def increment(self, metric: Metric, labels: Mapping[str, str], amount: float) -> None:
        """Add to a counter, soon."""
        key = (metric, tuple(labels.items()))
        with self._lock:
            self._latest[key] = self._latest.get(key, 0.0) + amount
        self._wake.set()

    def set(self, metric: Metric, labels: Mapping[str, str], value: float) -> None:
        """Set a gauge, soon."""
        with self._lock:
            self._latest[metric, tuple(labels.items())] = value
        self._wake.set()

    def observe(self, metric: Metric, labels: Mapping[str, str], values: NDArray[np.float64]) -> None:
        """Add (n,) values to a histogram, soon."""
        key = (metric, tuple(labels.items()))
        with self._lock:
            room = MAX_WAITING - len(self._observed)
            self._observed += [(key, value) for value in values[:room].tolist()]
        self._wake.set()

    def write_to(self, write: Write) -> None:
        """Start writing, beginning with what has gathered; only one thread calls `write`."""
        self._thread = threading.Thread(target=self._run, args=(write,), name="fides-metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Write what waits and stop; at most two seconds."""
        self._closing.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join(timeout=_CLOSE_S)

    def _run(self, write: Write) -> None:
        while not self._closing.is_set():
            self._wake.wait()
            self._closing.wait(_ROUND_S)
            self._wake.clear()
            self._flush(write)
        self._flush(write)

    def _flush(self, write: Write) -> None:
        with self._lock:
            latest, self._latest = self._latest, {}
            observed, self._observed = self._observed, []
        failed: dict[str, Exception] = {}
        for (metric, labels), value in [*latest.items(), *observed]:
            if metric.name in self._given_up:
                continue
            try:
                write(metric, dict(labels), value)
            except Exception as error:  # host boundary: a metric system may raise anything, and no answer depends on it
                self._given_up.add(metric.name)
                failed[metric.name] = error
        if failed:
            first = next(iter(failed.values()))
            logger.warning("metrics cannot be written: %s (%s: %s)", ", ".join(failed), type(first).__name__, first)
