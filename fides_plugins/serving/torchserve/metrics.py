"""Metrics through TorchServe's own endpoint, under the same names as on Triton.

TorchServe shows them only with these two lines in config.properties:

    metrics_mode=prometheus
    model_metrics_auto_detect=true

Each value is a line that the worker writes and the frontend parses (about 0.1 ms of the worker's time),
so updates are buffered. Buckets of histograms are TorchServe's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fides_plugins.observation.buffer import BufferedMetrics
from fides_plugins.observation.metrics import Metric


class TorchServeMetrics(BufferedMetrics):
    """A `MetricsBackend` over `context.metrics`; updates gather until `start`."""

    def start(self, metrics: Any) -> None:
        """Write to `metrics`, the worker's `context.metrics`, from now on."""
        from ts.metrics.dimension import Dimension
        from ts.metrics.metric_type_enum import MetricTypes

        def write(metric: Metric, labels: Mapping[str, str], value: float) -> None:
            # A fresh list each time: TorchServe appends its own dimensions to it.
            dimensions = [Dimension(name, _label(text)) for name, text in labels.items()]
            kind = MetricTypes[metric.kind.upper()]
            metrics.add_metric(metric.name, round(value, 7), "count", None, dimensions, kind)

        self.write_to(write)


def _label(text: str) -> str:
    """Dimensions travel in a line of `name:value,name:value|`, so these characters cannot."""
    return "".join(c if (c.isascii() and c.isalnum()) or c in "_-. " else "_" for c in text)[:100]
