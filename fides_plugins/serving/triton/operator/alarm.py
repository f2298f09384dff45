"""The service alarm of a protected model, as the server's metrics page shows it."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable

from fides_plugins.errors import ServerError
from fides_plugins.observation.metrics import UNDER_ATTACK
from fides_plugins.serving.finding import CheckFinding
from fides_plugins.serving.triton.operator.api import TritonApi
from fides_plugins.serving.triton.operator.probe import Protected

#: Seconds to wait for the page where the alarm is one finding of several: a liveness probe has to end in time.
_LOOK_S = 2.0
_POLL_S = 0.2
_WHAT = "service alarm"
#: Why a page that can be read may not show the alarm, and what to do.
NOT_SHOWN = (
    "Its bundle has no calibrated detector, another FIDES_SERVICE_NAME is set, or the metrics are elsewhere: "
    "--metrics HOST:PORT."
)


def alarm_label(api: TritonApi, item: Protected) -> str:
    """The label `model` of the step's metrics, as `MetricsRecorder` gets it."""
    named = api.config(item.validate).get("parameters", {}).get("fides.service_name", {})
    return str(named.get("string_value", "")) or item.validate


def read_alarm(api: TritonApi, label: str) -> bool | None:
    """The gauge on the metrics page; None where it is not shown.

    Raises
    ------
    ServerError
        If the page cannot be read.
    """
    return _gauge(api.metrics(), label)


def alarm_findings(api: TritonApi, items: Iterable[Protected], patience_s: float = 0.0) -> dict[str, CheckFinding]:
    """Whether each service's alarm is raised, by its label; unknown, and never good, where that cannot be seen.

    Parameters
    ----------
    patience_s:
        How long to wait for a gauge that is not shown; Triton shows the first values of a process after half a second.
    """
    names = {alarm_label(api, item): item.name for item in items}
    deadline = time.monotonic() + patience_s
    while True:
        try:
            page = api.metrics(_LOOK_S)
        except ServerError as error:
            return {label: CheckFinding(_WHAT, None, error.cause_text, error.remedy) for label in names}
        shown = {label: _gauge(page, label) for label in names}
        if None not in shown.values() or time.monotonic() >= deadline:
            return {label: _finding(api, names[label], label, raised) for label, raised in shown.items()}
        time.sleep(_POLL_S)


def _gauge(page: str, label: str) -> bool | None:
    found = re.search(rf'^{UNDER_ATTACK.name}{{model="{re.escape(label)}"}} (\S+)$', page, re.MULTILINE)
    return None if found is None else float(found[1]) > 0


def _finding(api: TritonApi, model: str, label: str, raised: bool | None) -> CheckFinding:
    if raised is None:
        return CheckFinding(_WHAT, None, f"{api.metrics_url} shows no alarm of {label!r}.", NOT_SHOWN)
    if raised:
        remedy = f"Follow the runbook (Operate it, Under attack); afterwards: fides reset triton URL {model}."
        return CheckFinding(_WHAT, False, f"Raised: {label} is under attack.", remedy)
    return CheckFinding(_WHAT, True, f"not raised, says {api.metrics_url}")
