"""HTTP with hosts that nobody trusts: a deadline for a whole exchange, and a bound on what is read of its answer.

httpx's time-outs begin again with every byte, and it unpacks whatever comes compressed. Here an answer comes as it is,
within its time and its size, or it is an error.
"""

from __future__ import annotations

import asyncio
import functools
import math
import os
import ssl
import threading
import time
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import anyio
import httpx

T = TypeVar("T")
_deadline: ContextVar[float] = ContextVar("fides_deadline", default=math.inf)


class AnswerTooLate(httpx.HTTPError):
    """The answer was not complete in time."""


class AnswerTooLong(httpx.HTTPError):
    """The answer is longer than any that was asked for."""


class AnswerCompressed(httpx.HTTPError):
    """The answer is compressed, which nobody asked for: how long it is cannot be told before it is unpacked."""


def connections(timeout_s: float) -> httpx.AsyncClient:
    """Connections to the address that is given and to no other: no proxy of the environment, no redirect.

    Certificates are checked against the system's roots, or those of SSL_CERT_FILE.
    """
    return httpx.AsyncClient(
        timeout=timeout_s, trust_env=False, follow_redirects=False, verify=ssl.create_default_context()
    )


@contextmanager
def within(timeout_s: float) -> Iterator[None]:
    """What is asked inside has `timeout_s` for all of it together."""
    token = _deadline.set(min(_deadline.get(), time.monotonic() + timeout_s))
    try:
        yield
    finally:
        _deadline.reset(token)


def remaining(timeout_s: float) -> float:
    """Seconds for the next exchange: `timeout_s`, or what is left of `within`."""
    return max(0.0, min(timeout_s, _deadline.get() - time.monotonic()))


async def exchange(client: httpx.AsyncClient, timeout_s: float, limit: int, **call: Any) -> httpx.Response:
    """One request and its answer.

    Parameters
    ----------
    client:
        The connections.
    timeout_s:
        From the connection to the answer's last byte.
    limit:
        Bytes of the longest answer.
    call:
        Arguments of httpx: `method`, `url` and others.

    Raises
    ------
    httpx.HTTPError
        One of this module, or of httpx.
    """
    call["headers"] = {**call.get("headers", {}), "accept-encoding": "identity"}
    body = bytearray()
    try:
        with anyio.fail_after(timeout_s):
            async with client.stream(**call) as reply:
                if reply.headers.get("content-encoding", "identity") != "identity":
                    raise AnswerCompressed("the answer is compressed")
                async for chunk in reply.aiter_raw():
                    body += chunk
                    if len(body) > limit:
                        raise AnswerTooLong(f"the answer is longer than {limit} bytes")
                return httpx.Response(reply.status_code, headers=reply.headers, content=bytes(body))
    except TimeoutError:
        raise AnswerTooLate(f"the answer did not come in {timeout_s:.3g} s") from None


def wait(coroutine: Coroutine[Any, Any, T]) -> T:
    """What comes of a coroutine, for callers that have no event loop of their own, or may not block it."""
    with _starting:
        loop = _background()
    return asyncio.run_coroutine_threadsafe(coroutine, loop).result()


_starting = threading.Lock()


@functools.lru_cache(maxsize=1)
def _background() -> asyncio.AbstractEventLoop:
    """An event loop in a thread of its own: only in one can a whole exchange be given up at a moment."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="fides-client", daemon=True).start()
    return loop


# A child of fork has no threads but its own.
os.register_at_fork(after_in_child=_background.cache_clear)
