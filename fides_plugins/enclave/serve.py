"""Run a verifier over HTTP, and over gRPC where wanted, until a signal comes."""

from __future__ import annotations

import asyncio
import importlib.util
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fides_plugins.enclave.http import HttpFront, ServerLimits, WorkQueue
from fides_plugins.enclave.http import make_server as make_http_server
from fides_plugins.enclave.verifier import Verifier
from fides_plugins.errors import ServerError


@dataclass(frozen=True)
class Endpoints:
    """Where a verifier listens; a port of None is not listened on."""

    host: str
    http_port: int
    grpc_port: int | None


async def serve(
    verifier: Verifier,
    endpoints: Endpoints,
    limits: ServerLimits | None = None,
    ready: Callable[[Endpoints], None] | None = None,
    stop: asyncio.Event | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT, then let running requests finish.

    Parameters
    ----------
    verifier:
        What answers.
    endpoints:
        Port 0 takes a free one.
    limits:
        Bounds of the server.
    ready:
        Called once with the real ports.
    stop:
        Set it to stop; for hosts that handle signals themselves.

    Raises
    ------
    ServerError
        If a port cannot be bound, or gRPC is wanted and not installed.
    """
    bounds = limits or ServerLimits()
    queue = WorkQueue(bounds)
    listener = _listen(endpoints.host, endpoints.http_port)
    http = make_http_server(HttpFront(verifier, queue, bounds), endpoints.host, endpoints.http_port, bounds)
    grpc_server, grpc_port = None, endpoints.grpc_port
    if grpc_port is not None:
        grpc_server, grpc_port = await _start_grpc(verifier, queue, endpoints, bounds)
    stopping = stop or asyncio.Event()
    if stop is None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stopping.set)
    task = asyncio.create_task(http.serve(sockets=[listener]))
    try:
        while not http.started and not task.done():
            await asyncio.sleep(0.01)
        if ready is not None and not task.done():
            ready(Endpoints(endpoints.host, listener.getsockname()[1], grpc_port))
        waiter = asyncio.create_task(stopping.wait())
        await asyncio.wait({task, waiter}, return_when=asyncio.FIRST_COMPLETED)
        waiter.cancel()
    finally:
        http.should_exit = True
        if grpc_server is not None:
            await grpc_server.stop(bounds.grace_s)
        await task
        queue.close()


async def _start_grpc(
    verifier: Verifier, queue: WorkQueue, endpoints: Endpoints, limits: ServerLimits
) -> tuple[Any, int]:
    if importlib.util.find_spec("grpc") is None or importlib.util.find_spec("tritonclient") is None:
        raise ServerError("gRPC is not installed.", "pip install 'tritonclient[grpc]', or leave out --grpc-port.")
    from fides_plugins.enclave import grpc as front

    try:
        server, port = await front.make_server(
            front.GrpcFront(verifier, queue, limits), endpoints.host, endpoints.grpc_port or 0, limits
        )
    except RuntimeError:
        port = 0
    if not port:
        raise ServerError(f"The gRPC port {endpoints.grpc_port} is not free.", "Choose another --grpc-port.")
    await server.start()
    return server, port


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
