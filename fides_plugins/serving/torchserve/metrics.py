"""Metrics through TorchServe's own endpoint, under the same names as on Triton.

TorchServe shows them only with these two lines in config.properties:

    metrics_mode=prometheus
    model_metrics_auto_detect=true

Each value is one line that the worker writes and the frontend parses, so values are gathered per batch.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from fides_plugins.serving.torchserve.judge import Judge
from fides_plugins.serving.torchserve.verdicts import RowVerdict, count_by_status

logger = logging.getLogger("fides_plugins")

VERDICTS = "fides_verdicts_total"
PLUGIN_ERRORS = "fides_plugin_errors_total"
SCORE = "fides_score"
STAGE_SECONDS = "fides_stage_seconds"
LOG_E_VALUE = "fides_monitor_log_e_value"
UNDER_ATTACK = "fides_under_attack"


class Reporter:
    """Reports what happened in one worker since the last batch."""

    def __init__(self, judge: Judge, model_name: str) -> None:
        from ts.metrics.dimension import Dimension
        from ts.metrics.metric_type_enum import MetricTypes

        self._dimension = Dimension
        self._types = MetricTypes
        self._judge = judge
        self._model = model_name
        self._errors_seen: Counter[str] = Counter()

    def report(self, context: Any, verdicts: Sequence[RowVerdict]) -> None:
        """Emit the metrics of one batch; a failure is logged and changes nothing."""
        try:
            self._report(context.metrics, verdicts)
        except Exception:  # host boundary: metrics must never cost an answer
            logger.exception("metrics cannot be reported")

    def _report(self, metrics: Any, verdicts: Sequence[RowVerdict]) -> None:
        if metrics is None:
            return
        for status, count in count_by_status(verdicts).items():
            self._emit(metrics, VERDICTS, count, "COUNTER", model=self._model, status=status)
        for verdict in verdicts:
            if not math.isnan(verdict.score):
                self._emit(metrics, SCORE, round(verdict.score, 6), "HISTOGRAM", model=self._model)
        seconds = self._judge.stage_seconds
        while seconds:
            stage, value = seconds.popleft()
            self._emit(metrics, STAGE_SECONDS, round(value, 7), "HISTOGRAM", stage=stage)
        pipeline = self._judge.pipeline
        if pipeline is None:
            return
        errors = Counter(pipeline.plugin_errors)
        for plugin, count in (errors - self._errors_seen).items():
            self._emit(metrics, PLUGIN_ERRORS, count, "COUNTER", plugin=plugin)
        self._errors_seen = errors

    def _emit(self, metrics: Any, name: str, value: float, kind: str, **labels: str) -> None:
        # A fresh list each time: TorchServe appends its own dimensions to it.
        dimensions = [self._dimension(key, _label(text)) for key, text in labels.items()]
        metrics.add_metric(name, value, "count", None, dimensions, getattr(self._types, kind))


def _label(text: str) -> str:
    """Dimension values travel in a line of `name:value,name:value|`, so these characters cannot."""
    return "".join(c if c.isalnum() or c in "_-." else "_" for c in text)[:100]
