"""Withdraw the service alarm of a protected model: a new process of its validation, seen to be quiet."""

from __future__ import annotations

import time
from dataclasses import dataclass

from fides_plugins.errors import ServerError
from fides_plugins.serving.triton.operator.alarm import NOT_SHOWN, alarm_label, read_alarm
from fides_plugins.serving.triton.operator.api import TritonApi
from fides_plugins.serving.triton.operator.probe import find_protected

#: Triton takes new values over about twice a second; the gauge must be quiet for longer than that.
_QUIET_S = 1.5
_POLL_S = 0.2


@dataclass(frozen=True)
class Reset:
    """What a reset did.

    Attributes
    ----------
    step:
        The step that was reloaded.
    was_under_attack, under_attack:
        The alarm before and after.
    """

    step: str
    was_under_attack: bool
    under_attack: bool


def reset(api: TritonApi, model: str, timeout_s: float = 10.0) -> Reset:
    """Restart the process of `fides_validate`, where the alarm lives, and wait until the metrics show it quiet.

    Nothing else is touched: the old process serves until the new one is there.

    Raises
    ------
    NotExplicit
        If the server does not run in explicit mode; only a restart withdraws the alarm there.
    ServerError
        If the server or its metrics cannot be reached, `model` is not protected or has no alarm.
    """
    (item,) = find_protected(api, model)
    label = alarm_label(api, item)
    was = read_alarm(api, label)
    api.reload(item.validate)
    deadline = time.monotonic() + timeout_s
    quiet_since = None
    now = was
    while time.monotonic() < deadline:
        now = read_alarm(api, label)
        if now is not False:
            quiet_since = None
        elif quiet_since is None:
            quiet_since = time.monotonic()
        elif time.monotonic() - quiet_since > _QUIET_S:
            return Reset(item.validate, bool(was), False)
        time.sleep(_POLL_S)
    if now is None:
        raise ServerError(
            f"{item.validate} was reloaded, but {api.metrics_url} shows no alarm of {label!r}.",
            NOT_SHOWN,
        )
    return Reset(item.validate, bool(was), True)
