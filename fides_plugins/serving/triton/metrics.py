"""Metrics on Triton's own endpoint, through the python backend's custom metrics.

Processes of the same server share the families: instances and models add to the same counters and
histograms. A gauge shows the value written last, so `fides_validate` should run as one instance where
the monitor's gauges matter.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from fides_plugins.types import Status, Verdict

logger = logging.getLogger("fides_plugins")

STAGE_BUCKETS = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
SCORE_BUCKETS = (0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
#: Rows of one batch that the score histogram takes; each observation is a message to the server.
MAX_SCORES_PER_BATCH = 64


class Metrics:
    """The metric families of one step. A metric that cannot be made or set is logged once and left out."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._families: dict[str, Any] = {}
        self._metrics: dict[tuple[str, tuple[str, ...]], Any] = {}
        self._plugin_errors: Counter[str] = Counter()

    def stage(self, stage: str, seconds: float) -> None:
        """`fides_stage_seconds{stage}`."""
        self._observe("fides_stage_seconds", "Seconds by stage", {"stage": stage}, seconds, STAGE_BUCKETS)

    def verdict(self, verdict: Verdict) -> None:
        """`fides_verdicts_total{model,status}` and `fides_score`."""
        for status, count in zip(Status, np.bincount(verdict.status, minlength=len(Status)), strict=True):
            if count:
                labels = {"model": self._model, "status": status.text}
                self._add("fides_verdicts_total", "Rows by status of their verdict", labels, float(count))
        scores = verdict.score[np.isfinite(verdict.score)]
        for score in scores[:MAX_SCORES_PER_BATCH].tolist():
            self._observe("fides_score", "Suspicion scores of judged rows", {}, score, SCORE_BUCKETS)

    def plugin_errors(self, total: Mapping[str, int]) -> None:
        """`fides_plugin_errors_total{plugin}`, from the pipeline's running totals."""
        for plugin, count in total.items():
            new = count - self._plugin_errors[plugin]
            if new > 0:
                self._plugin_errors[plugin] = count
                self._add("fides_plugin_errors_total", "Failures by plug-in", {"plugin": plugin}, float(new))

    def monitor(self, log_e_value: float, under_attack: bool) -> None:
        """`fides_monitor_log_e_value` and `fides_under_attack`."""
        labels = {"model": self._model}
        self._set("fides_monitor_log_e_value", "Log evidence of an attack on the service", labels, log_e_value)
        self._set("fides_under_attack", "1 while the service alarm is raised", labels, float(under_attack))

    def _add(self, name: str, text: str, labels: dict[str, str], amount: float) -> None:
        metric = self._metric(name, text, pb_utils.MetricFamily.COUNTER, labels)
        if metric is not None:
            metric.increment(amount)

    def _set(self, name: str, text: str, labels: dict[str, str], value: float) -> None:
        metric = self._metric(name, text, pb_utils.MetricFamily.GAUGE, labels)
        if metric is not None:
            metric.set(value)

    def _observe(self, name: str, text: str, labels: dict[str, str], value: float, buckets: tuple[float, ...]) -> None:
        metric = self._metric(name, text, pb_utils.MetricFamily.HISTOGRAM, labels, list(buckets))
        if metric is not None:
            metric.observe(value)

    def _metric(
        self, name: str, text: str, kind: Any, labels: dict[str, str], buckets: list[float] | None = None
    ) -> Any:
        key = (name, tuple(labels.values()))
        if key not in self._metrics:
            try:
                if name not in self._families:
                    self._families[name] = pb_utils.MetricFamily(name=name, description=text, kind=kind)
                extra = {} if buckets is None else {"buckets": buckets}
                self._metrics[key] = self._families[name].Metric(labels=labels, **extra)
            except pb_utils.TritonModelException as error:
                # A server started without metrics: validation must not depend on them.
                logger.warning("metric %s is not available: %s", name, error)
                self._metrics[key] = None
        return self._metrics[key]
