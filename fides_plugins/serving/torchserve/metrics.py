"""Metrics through TorchServe's own endpoint, under the same names as on Triton.

TorchServe shows them only with these two lines in config.properties:

    metrics_mode=prometheus
    model_metrics_auto_detect=true

Each value is one line that the worker writes and the frontend parses. Updates come from several threads
(stages are timed where they run), TorchServe's metrics belong to the thread that answers; so updates
are gathered and written once per batch. Buckets of histograms are TorchServe's own.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fides_plugins.metrics import Metric

logger = logging.getLogger("fides_plugins")

#: More updates than one batch can make; older ones are dropped if nobody writes them.
_MAX_PENDING = 10_000


class TorchServeMetrics:
    """A `MetricsBackend` that gathers updates until `flush`."""

    def __init__(self) -> None:
        from ts.metrics.dimension import Dimension
        from ts.metrics.metric_type_enum import MetricTypes

        self._dimension = Dimension
        self._kinds = {
            "counter": MetricTypes.COUNTER,
            "gauge": MetricTypes.GAUGE,
            "histogram": MetricTypes.HISTOGRAM,
        }
        self._pending: deque[tuple[Metric, Mapping[str, str], float]] = deque(maxlen=_MAX_PENDING)

    def increment(self, metric: Metric, labels: Mapping[str, str], amount: float) -> None:
        """Add to a counter."""
        self._pending.append((metric, labels, amount))

    def set(self, metric: Metric, labels: Mapping[str, str], value: float) -> None:
        """Set a gauge."""
        self._pending.append((metric, labels, value))

    def observe(self, metric: Metric, labels: Mapping[str, str], values: NDArray[np.float64]) -> None:
        """Add (n,) values to a histogram; each is a line of its own."""
        self._pending.extend((metric, labels, float(v)) for v in values)

    def flush(self, metrics: Any) -> None:
        """Write what was gathered to `context.metrics`. A failure is logged and changes nothing."""
        try:
            while self._pending:
                metric, labels, value = self._pending.popleft()
                # A fresh list each time: TorchServe appends its own dimensions to it.
                dimensions = [self._dimension(key, _label(text)) for key, text in labels.items()]
                metrics.add_metric(metric.name, round(value, 7), "count", None, dimensions, self._kinds[metric.kind])
        except Exception:  # host boundary: metrics must never cost an answer
            logger.exception("metrics cannot be written")


def _label(text: str) -> str:
    """Dimensions travel in a line of `name:value,name:value|`, so these characters cannot."""
    return "".join(c if (c.isascii() and c.isalnum()) or c in "_-. " else "_" for c in text)[:100]
