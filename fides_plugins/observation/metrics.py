"""One vocabulary of metrics for every host, and the recorder that fills it.

Names, labels, help texts and buckets are data (`METRICS`); a host brings a `MetricsBackend` of three
methods over whatever its server offers, and the recorder does the rest. Every series carries `model`,
because one server may protect several models. docs/reference/metrics.md explains each.

Example
-------
>>> from fides_plugins.observation.metrics import MetricsRecorder
>>> class Lines:
...     def increment(self, metric, labels, amount): print(metric.name, labels["status"], amount)
...     def set(self, metric, labels, value): ...
...     def observe(self, metric, labels, values): ...
>>> recorder = MetricsRecorder(Lines(), model="digits")
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from fides_plugins.observation.alarm import ServiceAlarm, make_monitor
from fides_plugins.types import STATUS_TEXTS, Verdict

if TYPE_CHECKING:
    from fides_plugins.pipeline import Pipeline

logger = logging.getLogger("fides_plugins")

MetricKind = Literal["counter", "gauge", "histogram"]

#: Seconds: a stage of a small model takes a tenth of a millisecond, the default time-out is one second.
STAGE_BUCKETS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
#: Scores lie in [0, 1]; benign ones crowd at the low end and attacks at the high end.
SCORE_BUCKETS = (0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)


@dataclass(frozen=True)
class Metric:
    """One metric family.

    Attributes
    ----------
    name, kind, help:
        As Prometheus shows them; counters end in `_total`, units are base units.
    labels:
        Label names, in order; `model` is always the first.
    buckets:
        Upper bounds of a histogram without +Inf; empty for the others.
    """

    name: str
    kind: MetricKind
    help: str
    labels: tuple[str, ...] = ("model",)
    buckets: tuple[float, ...] = ()


VERDICTS = Metric(
    "fides_verdicts_total", "counter", "Rows judged, by the status of their verdict.", ("model", "status")
)
PLUGIN_ERRORS = Metric(
    "fides_plugin_errors_total", "counter", "Failed calls of a plug-in: errors, time-outs, refused calls.",
    ("model", "plugin"),
)  # fmt: skip
SCORE = Metric("fides_score", "histogram", "Suspicion score of judged rows, in [0, 1].", ("model",), SCORE_BUCKETS)
STAGE_SECONDS = Metric(
    "fides_stage_seconds", "histogram", "Seconds that one stage took for one batch.", ("model", "stage"), STAGE_BUCKETS
)
LOG_E_VALUE = Metric(
    "fides_monitor_log_e_value", "gauge", "Natural logarithm of the evidence that the service is under attack."
)
UNDER_ATTACK = Metric("fides_under_attack", "gauge", "1 while the service alarm is raised, else 0.")
FALSE_ALARM_RATE = Metric("fides_false_alarm_rate", "gauge", "Share of benign rows that settings allow to be flagged.")
TIMEOUT_SECONDS = Metric("fides_timeout_seconds", "gauge", "Seconds that settings allow each stage.")
AUDIT_LINES = Metric(
    "fides_audit_lines_total", "counter", "Lines of the audit log: written, or lost to a full queue or a failing disk.",
    ("model", "outcome"),
)  # fmt: skip

#: Every metric above by name; the order is that of the documentation.
METRICS: Mapping[str, Metric] = MappingProxyType({m.name: m for m in list(vars().values()) if isinstance(m, Metric)})


class MetricsBackend(Protocol):
    """What a host's metric system must do. `labels` holds every label of the metric, in its order."""

    def increment(self, metric: Metric, labels: Mapping[str, str], amount: float) -> None:
        """Add to a counter; an amount of zero makes the series appear."""

    def set(self, metric: Metric, labels: Mapping[str, str], value: float) -> None:
        """Set a gauge."""

    def observe(self, metric: Metric, labels: Mapping[str, str], values: NDArray[np.float64]) -> None:
        """Add (n,) values to a histogram."""


class CountsLines(Protocol):
    """A plug-in that counts lines of a log by outcome (the audit log does)."""

    @property
    def line_counts(self) -> Mapping[str, int]:
        """Totals since start, by outcome."""


class MetricsRecorder:
    """Turns verdicts, stage times and plug-in failures into metrics.

    A `Protection` shows it every verdict; `attach` makes it the pipeline's stage observer too. A backend that
    fails is logged once and never reaches the serving path.

    Parameters
    ----------
    backend:
        The host's metric system.
    model:
        Value of the label `model`: the name clients use.
    alarm:
        Whether to follow the sequence of verdicts with the service monitor, which then feeds
        `fides_monitor_log_e_value` and `fides_under_attack`.

    Attributes
    ----------
    failures:
        Updates that the backend refused.
    """

    def __init__(self, backend: MetricsBackend, model: str, alarm: bool = True) -> None:
        self.backend = backend
        self.model = model
        self.failures = 0
        self.alarm: ServiceAlarm | None = None
        self._wants_alarm = alarm
        self._quiet_shown = False
        self._lock = threading.Lock()
        self._totals: dict[str, Counter[str]] = {PLUGIN_ERRORS.name: Counter(), AUDIT_LINES.name: Counter()}
        self._errors: Mapping[str, int] = {}
        self._logs: tuple[CountsLines, ...] = ()

    def attach(self, pipeline: Pipeline) -> None:
        """Observe a pipeline's stages, plug-in failures and logs, and make its series appear at zero."""
        pipeline.on_stage = self.observe_stage
        self._errors = pipeline.plugin_errors
        self._logs = tuple(p for p in pipeline.manager.get_plugins() if hasattr(p, "line_counts"))
        settings = pipeline.settings
        for status in STATUS_TEXTS:
            self._increment(VERDICTS, status, 0)
        for plugin, _ in pipeline.manager.list_name_plugin():
            self._increment(PLUGIN_ERRORS, plugin, 0)
        self._set(FALSE_ALARM_RATE, settings.false_alarm_rate)
        self._set(TIMEOUT_SECONDS, settings.timeout_ms / 1000.0)
        monitor = make_monitor(settings, pipeline.bundle) if self._wants_alarm else None
        if monitor is not None:
            self.alarm = ServiceAlarm(monitor, self.model, self._publish_alarm)
            # A process that takes the place of an alarmed one withdraws its alarm without waiting for a row.
            self._set(LOG_E_VALUE, 0.0)
            self._set(UNDER_ATTACK, 0.0)
        self.refresh()

    def close(self) -> None:
        """Stop the service alarm's thread."""
        if self.alarm is not None:
            self.alarm.close()

    def observe_verdict(self, verdict: Verdict, request_ids: Sequence[str] = ()) -> None:
        """Count statuses, observe scores and test the sequence of N rows."""
        for status, count in verdict.counts().items():
            if count:
                self._increment(VERDICTS, status, count)
        scores = verdict.score[np.isfinite(verdict.score)].astype(np.float64)
        if scores.size:
            self._call(self.backend.observe, SCORE, {"model": self.model}, scores)
        if self.alarm is not None:
            self.alarm.put(verdict.p_value, request_ids)
        self.refresh()

    def observe_stage(self, stage: str, seconds: float) -> None:
        """The pipeline's stage observer; never raises."""
        labels = {"model": self.model, "stage": stage}
        self._call(self.backend.observe, STAGE_SECONDS, labels, np.array([seconds], dtype=np.float64))

    def refresh(self) -> None:
        """Publish plug-in failures and log lines; hosts may call it on a timer too."""
        self._publish_totals(PLUGIN_ERRORS, self._errors)
        lines: Counter[str] = Counter()
        for log in self._logs:
            lines.update(log.line_counts)
        self._publish_totals(AUDIT_LINES, lines)

    def _publish_alarm(self, log_e_value: float, under_attack: bool) -> None:
        self._set(LOG_E_VALUE, log_e_value)
        # Several processes may write this gauge: one that sees nothing says so once and then stays silent,
        # so that it does not withdraw another one's alarm.
        if under_attack or not self._quiet_shown:
            self._set(UNDER_ATTACK, float(under_attack))
            self._quiet_shown = not under_attack

    def _publish_totals(self, metric: Metric, totals: Mapping[str, int]) -> None:
        """Add what a running total gained since the last call."""
        known = self._totals[metric.name]
        gained: list[tuple[str, int]] = []
        with self._lock:
            # A copy: another thread may add a key while this one looks.
            for key, total in dict(totals).items():
                if key not in known or total > known[key]:
                    gained.append((key, total - known[key]))
                    known[key] = total
        for key, amount in gained:
            self._increment(metric, key, amount)

    def _increment(self, metric: Metric, second: str, amount: int) -> None:
        self._call(self.backend.increment, metric, {"model": self.model, metric.labels[1]: second}, float(amount))

    def _set(self, metric: Metric, value: float) -> None:
        self._call(self.backend.set, metric, {"model": self.model}, float(value))

    def _call(self, update: Callable[..., None], metric: Metric, labels: Mapping[str, str], value: Any) -> None:
        try:
            update(metric, labels, value)
        except Exception as error:  # host boundary: a metric system may raise anything, and no answer depends on it
            self.failures += 1
            if self.failures == 1:
                logger.warning("metric %s cannot be updated: %s: %s", metric.name, type(error).__name__, error)
