"""The service alarm of a protected model, as the server's metrics page shows it."""

from __future__ import annotations

import re

from fides_plugins.errors import ServerError
from fides_plugins.observation.metrics import UNDER_ATTACK
from fides_plugins.serving.finding import CheckFinding
from fides_plugins.serving.triton.operator.api import TritonApi
from fides_plugins.serving.triton.operator.probe import Protected

#: Seconds to wait for the page where the alarm is one finding of several: a liveness probe has to end in time.
_LOOK_S = 2.0
#: Why a page that can be read may not show the alarm, and what to do.
NOT_SHOWN = (
    "Its bundle has no calibrated detector, another FIDES_SERVICE_NAME is set, or the metrics are elsewhere: "
    "--metrics HOST:PORT."
)


def alarm_label(api: TritonApi, item: Protected) -> str:
    """The label `model` of the step's metrics, as `MetricsRecorder` gets it."""
    named = api.config(item.validate).get("parameters", {}).get("fides.service_name", {})
    return str(named.get("string_value", "")) or item.validate


def read_alarm(api: TritonApi, label: str, timeout_s: float | None = None) -> bool | None:
    """The gauge on the metrics page; None where it is not shown.

    Raises
    ------
    ServerError
        If the page cannot be read.
    """
    page = api.metrics(timeout_s)
    found = re.search(rf'^{UNDER_ATTACK.name}{{model="{re.escape(label)}"}} (\S+)$', page, re.MULTILINE)
    return None if found is None else float(found[1]) > 0


def alarm_finding(api: TritonApi, item: Protected, label: str) -> CheckFinding:
    """Whether the alarm is raised; unknown, and never good, where that cannot be seen."""
    what = "service alarm"
    try:
        raised = read_alarm(api, label, _LOOK_S)
    except ServerError as error:
        return CheckFinding(what, None, error.cause_text, error.remedy)
    if raised is None:
        detail = f"{api.metrics_url} shows no alarm of {label!r}"
        return CheckFinding(what, None, detail, NOT_SHOWN)
    if raised:
        remedy = f"Follow the runbook (Operate it, Under attack); afterwards `fides reset triton URL {item.name}`."
        return CheckFinding(what, False, f"raised: {label} is under attack", remedy)
    return CheckFinding(what, True, f"not raised, says {api.metrics_url}")
