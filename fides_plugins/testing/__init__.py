"""What an author of a plug-in needs to test it.

Fakes of what flows between hooks, a real bundle of a few kilobytes, and `check_plugin`, which runs a
plug-in against the contract of its hooks; `check_host` does the same for a host. The fixtures of
`fides_plugins.pytest_plugin` use them.
"""

from __future__ import annotations

from fides_plugins.testing.contract import BATCH_SIZES, CLASS_COUNTS, CallTime, CheckReport, check_plugin, plugin_name
from fides_plugins.testing.endpoint import OipServer
from fides_plugins.testing.fakes import (
    INPUT_NAME,
    OPSET,
    fake_logits,
    fake_query,
    fake_service,
    linear_onnx,
    make_bundle,
    memory_bundle,
    switch_top_two,
)
from fides_plugins.testing.hosts import Answered, HostCase, check_host, host_cases, host_requests

__all__ = [
    "BATCH_SIZES",
    "CLASS_COUNTS",
    "INPUT_NAME",
    "OPSET",
    "Answered",
    "CallTime",
    "CheckReport",
    "HostCase",
    "OipServer",
    "check_host",
    "check_plugin",
    "fake_logits",
    "fake_query",
    "fake_service",
    "host_cases",
    "host_requests",
    "linear_onnx",
    "make_bundle",
    "memory_bundle",
    "plugin_name",
    "switch_top_two",
]
