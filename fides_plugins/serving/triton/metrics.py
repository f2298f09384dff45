"""Metrics on Triton's own endpoint, through the python backend's custom metrics.

Every update is a message to the server process (20 to 60 microseconds, measured), so updates are
buffered. Processes of one server share the families: instances and models add to the same counters and
histograms. A gauge shows the value written last, so `fides_validate` should run as one instance where
the monitor's gauges matter.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fides_plugins.observation.buffer import BufferedMetrics
from fides_plugins.observation.metrics import Metric

#: What Triton's metric object calls an update of each kind.
_UPDATE = {"counter": "increment", "gauge": "set", "histogram": "observe"}


class TritonMetrics(BufferedMetrics):
    """A `MetricsBackend` over `pb_utils.MetricFamily`; writes from the start."""

    def __init__(self) -> None:
        super().__init__()
        # Triton's own module exists only inside its python backend.
        import triton_python_backend_utils as pb_utils

        self._make_family: Any = pb_utils.MetricFamily
        self._families: dict[str, Any] = {}
        self._series: dict[tuple[str, ...], Any] = {}
        self.write_to(self._write)

    def _write(self, metric: Metric, labels: Mapping[str, str], value: float) -> None:
        key = (metric.name, *labels.values())
        if key not in self._series:
            if metric.name not in self._families:
                kind = getattr(self._make_family, metric.kind.upper())
                self._families[metric.name] = self._make_family(name=metric.name, description=metric.help, kind=kind)
            extra = {"buckets": list(metric.buckets)} if metric.buckets else {}
            self._series[key] = self._families[metric.name].Metric(labels=dict(labels), **extra)
        getattr(self._series[key], _UPDATE[metric.kind])(value)
