"""Run a verifier over HTTP until a signal comes."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable
from dataclasses import replace

from fides_plugins.enclave.connections import ServerLimits, make_server, spare_descriptors, sparing_log
from fides_plugins.enclave.http import HttpFront, WorkQueue
from fides_plugins.enclave.verifier import Verifier
from fides_plugins.errors import ServerError


async def serve(
    verifier: Verifier,
    host: str,
    port: int,
    limits: ServerLimits | None = None,
    ready: Callable[[int], None] | None = None,
    stop: asyncio.Event | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT, then let running requests finish.

    Parameters
    ----------
    verifier:
        What answers.
    host, port:
        Where to listen; port 0 takes a free one.
    limits:
        Bounds of the server.
    ready:
        Called once with the real port.
    stop:
        Set it to stop; for hosts that handle signals themselves.

    Raises
    ------
    ServerError
        If the port cannot be bound.
    """
    bounds = limits or ServerLimits()
    bounds = replace(bounds, connections=spare_descriptors(bounds.connections))
    queue = WorkQueue(bounds)
    listener = _listen(host, port)
    http = make_server(HttpFront(verifier, queue, bounds).app, bounds)
    stopping = stop or asyncio.Event()
    if stop is None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stopping.set)
    with sparing_log(bounds.log_lines):
        task = asyncio.create_task(http.serve(sockets=[listener]))
        try:
            while not http.started and not task.done():
                await asyncio.sleep(0.01)
            if ready is not None and not task.done():
                ready(listener.getsockname()[1])
            waiter = asyncio.create_task(stopping.wait())
            await asyncio.wait({task, waiter}, return_when=asyncio.FIRST_COMPLETED)
            waiter.cancel()
        finally:
            http.should_exit = True
            await task
            queue.close()


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio turns Nagle's algorithm off only where the protocol is named; without it an answer waits 40 ms.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise ServerError(f"Cannot listen on {host}:{port}: {error.strerror}.", "Choose another --port.") from None
    return listener
