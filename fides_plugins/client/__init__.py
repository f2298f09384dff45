"""Clients that decide on their own side whether the answer of an untrusted host may be used.

They send a request that only their verifier answers, check its receipt against attested keys, and run
detection, re-classification and the service monitor here. Install with `pip install fides-plugins[client]`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fides_plugins.client.torchserve import AsyncTorchServeClient, TorchServeClient
    from fides_plugins.client.triton import AsyncTritonClient, TritonClient

__all__ = ["AsyncTorchServeClient", "AsyncTritonClient", "TorchServeClient", "TritonClient"]


def __getattr__(name: str) -> Any:
    """Import a client when it is first asked for, so that one does not need the other's libraries."""
    if name not in __all__:
        raise AttributeError(name)
    home = "torchserve" if "TorchServe" in name else "triton"
    return getattr(importlib.import_module(f"fides_plugins.client.{home}"), name)
