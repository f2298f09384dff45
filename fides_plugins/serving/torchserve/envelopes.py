"""Stand outside of TorchServe's service envelopes (`service_envelope` in config.properties).

TorchServe puts an envelope around a handler's `handle()`: the handler gets the rows of all requests in one list, and
what it returns is joined into bodies again. From inside, a refusal would be one more row in a body of status 200, and
nobody could tell which rows are whose. So Fides changes places with it: the envelope runs around the original handler,
and Fides around both, with one request and one body per client.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

_OURS = "_fides_stands_outside"


def stand_outside(handler_class: type) -> None:
    """Let a service envelope that TorchServe puts around a `handler_class` call its `enclose(envelope class)` and then
    its `handle`, instead of wrapping it.

    In place and by the base class of all envelopes, because TorchServe makes the envelope itself and takes its bound
    `handle`: after the handler was made, and before it is initialized.
    """
    from ts.torch_handler.request_envelope.base import BaseEnvelope

    inside: Callable[..., Any] = BaseEnvelope.handle
    if hasattr(inside, _OURS):
        return

    @functools.wraps(inside)
    def handle(envelope: Any, data: Any, context: Any) -> Any:
        ours = getattr(envelope._handle_fn, "__self__", None)
        if not isinstance(ours, handler_class):
            return inside(envelope, data, context)
        ours.enclose(type(envelope))  # type: ignore[attr-defined]
        return ours.handle(data, context)  # type: ignore[attr-defined]

    setattr(handle, _OURS, True)
    BaseEnvelope.handle = handle


def items_per_request(envelope: Any, n_requests: int) -> list[int] | None:
    """How many items an envelope took out of each request of its last batch; None where it does not tell."""
    lengths = getattr(envelope, "_lengths", None)
    return list(lengths) if isinstance(lengths, list) and len(lengths) == n_requests else None
