"""The service alarm: the monitor of `statistics/monitor.py`, fed outside the serving path.

One row costs the monitor about a tenth of a millisecond, so verdicts wait in a bounded queue for a thread
of its own. Rows that do not fit are left out and counted; leaving rows out without regard to their
p-values costs power, never validity.
"""

from __future__ import annotations

import logging
import math
import threading
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from fides_plugins.builtin.detect import LEARNED
from fides_plugins.bundle import Bundle
from fides_plugins.settings import Settings
from fides_plugins.statistics.monitor import SequenceMonitor

logger = logging.getLogger("fides_plugins")

#: Rows that may wait: about a second of the monitor's time.
MAX_WAITING = 10_000

#: Told the natural logarithm of the e-value and whether the alarm is raised.
OnState = Callable[[float, bool], None]


class ServiceAlarm:
    """Feeds a `SequenceMonitor` from any thread and says what it finds.

    Parameters
    ----------
    monitor:
        Owned by this object's thread from now on.
    service:
        Name of the protected model, for the log.
    on_state:
        Called by the thread after each batch of rows; must not raise.

    Attributes
    ----------
    left_out:
        Rows that were not tested because too many waited.
    """

    def __init__(self, monitor: SequenceMonitor, service: str, on_state: OnState) -> None:
        self.left_out = 0
        self._monitor = monitor
        self._service = service
        self._on_state = on_state
        self._queue: deque[tuple[NDArray[np.float32], Sequence[str]]] = deque()
        self._waiting = 0
        self._wake = threading.Condition()
        self._closing = False
        self._reset = False
        self._thread: threading.Thread | None = None

    def put(self, p_values: NDArray[np.float32], request_ids: Sequence[str] = ()) -> None:
        """Queue the (N,) p-values of one batch; never blocks."""
        with self._wake:
            if self._closing or self._waiting + len(p_values) > MAX_WAITING:
                self.left_out += len(p_values)
                return
            self._queue.append((p_values, request_ids))
            self._waiting += len(p_values)
            if self._thread is None:
                # Started by the first row, so that a host may fork after it has loaded the pipeline.
                self._thread = threading.Thread(target=self._run, name="fides-alarm", daemon=True)
                self._thread.start()
            self._wake.notify()

    def reset(self) -> None:
        """After an incident: withdraw the alarm and start again with what was learned before it."""
        with self._wake:
            self._reset = True
            self._wake.notify()

    def close(self) -> None:
        """Stop, without testing what still waits."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if self._thread is not None:
            self._thread.join(timeout=2.0)

    def _run(self) -> None:
        try:
            self._follow()
        except Exception:  # thread boundary: an alarm that has ended must say so
            logger.exception("the service alarm of %r ended; rows are no longer tested", self._service)
            with self._wake:
                self._closing = True
                self.left_out += self._waiting
                self._queue.clear()

    def _follow(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._queue or self._closing or self._reset)
                if self._closing:
                    return
                if self._reset:
                    self._reset = False
                    self._monitor.reset()
                batch = self._queue.popleft() if self._queue else None
                if batch is not None:
                    self._waiting -= len(batch[0])
            if batch is not None:
                self._test(*batch)
            self._on_state(math.log(max(self._monitor.e_value, 1e-300)), self._monitor.alarm is not None)

    def _test(self, p_values: NDArray[np.float32], request_ids: Sequence[str]) -> None:
        alarm = self._monitor.update(p_values, request_ids)
        if alarm is not None:
            logger.error(
                "the service %r is under attack: e-value %.3g after %d rows%s",
                self._service,
                alarm.e_value,
                alarm.rows_since_reset,
                f", request {alarm.request_id}" if alarm.request_id else "",
            )


def make_monitor(settings: Settings, bundle: Bundle | None) -> SequenceMonitor | None:
    """The monitor for these settings; None where no built-in detector is calibrated."""
    known = bundle.calibrations() if bundle is not None else {}
    used = {"learned": (LEARNED,), "divergence": (settings.divergence,), "both": (LEARNED, settings.divergence)}
    counts = [known[name].n for name in used[settings.detector] if name in known]
    return SequenceMonitor(min(counts), settings.monitor_error) if counts else None
