"""What one peer can make the verifier's HTTP server hold: connections, idle time, and lines of its log."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import resource
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

#: Descriptors for everything besides connections, those included that were accepted and not looked at yet.
_SPARE_DESCRIPTORS = 64
_BACKLOG = 256
#: Loggers that write a line for what a peer does.
_LOGGERS = ("uvicorn.error", "asyncio", "fides_plugins")


@dataclass(frozen=True)
class ServerLimits:
    """What one server holds at most.

    Attributes
    ----------
    workers:
        Requests that run at once.
    queue:
        Requests that wait for a worker, half of them one peer's; more are refused at once.
    timeout_s:
        From a complete request to its answer.
    body_bytes, body_timeout_s:
        Size of one body, and the time it may take to arrive. A size of None is what the largest honest batch
        needs, by the bundle (`request_bounds`).
    buffered_bytes:
        All bodies together; at least twice the size of one. Those of one peer may have half.
    evidence_rate, evidence_burst:
        Fresh evidence for one peer, per second and at once.
    header_timeout_s:
        Time for a request's headers to arrive, and for an answer to be taken.
    idle_timeout_s:
        Time that a connection is kept between two requests.
    connections, peer_connections:
        Connections at once, of all and of one peer; more are closed unread.
    log_lines:
        Lines of the log in ten seconds, from each logger.
    grace_s:
        Time for running requests when the server stops.
    """

    workers: int = 2
    queue: int = 64
    timeout_s: float = 10.0
    body_bytes: int | None = None
    body_timeout_s: float = 10.0
    buffered_bytes: int = 48 << 20
    evidence_rate: float = 10.0
    evidence_burst: float = 100.0
    header_timeout_s: float = 10.0
    idle_timeout_s: float = 30.0
    connections: int = 512
    peer_connections: int = 128
    log_lines: int = 20
    grace_s: float = 10.0


def peer_of(host: str) -> bytes:
    """Whom an address belongs to, as far as it tells; IPv6 has addresses to spare, so there a network is one peer."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return b""
    return (getattr(address, "ipv4_mapped", None) or address).packed[:8]


class _Connection(H11Protocol):
    """uvicorn's HTTP/1.1 with bounds that it lacks: on connections, and on what is neither asked nor taken.

    One timer runs whenever no request does, and while an answer waits for its peer; only a request with complete
    headers stops it, so that bytes that come now and then win nothing.
    """

    limits: ClassVar[ServerLimits]
    peers: ClassVar[Counter[bytes]]

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._timer: asyncio.TimerHandle | None = None
        self._peer = peer_of(self.client[0] if self.client else "")
        self.peers[self._peer] += 1
        if self.peers[self._peer] > self.limits.peer_connections or self.peers.total() > self.limits.connections:
            transport.abort()
        else:
            self._watch(self.limits.header_timeout_s)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        self.peers[self._peer] -= 1
        if not self.peers[self._peer]:
            del self.peers[self._peer]
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch(self.limits.header_timeout_s)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch(self.limits.idle_timeout_s)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._start(self.limits.header_timeout_s)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop()
        self._watch(self.limits.idle_timeout_s)

    def _watch(self, seconds: float) -> None:
        """Stop the timer where a request is under way; start it where none is."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop()
        else:
            self._start(seconds)

    def _start(self, seconds: float) -> None:
        if self._timer is None:
            # Not closed but cut off: a peer that takes nothing would keep a closing connection for ever.
            self._timer = self.loop.call_later(seconds, self.transport.abort)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def make_server(app: Any, limits: ServerLimits) -> uvicorn.Server:
    """A uvicorn server that is not started yet and has no socket."""
    bounds = {"limits": limits, "peers": Counter[bytes]()}
    config = uvicorn.Config(
        app,
        http=type("Connection", (_Connection,), bounds),
        ws="none",
        lifespan="off",
        loop="asyncio",
        log_config=None,
        access_log=False,
        server_header=False,
        backlog=_BACKLOG,
        timeout_keep_alive=max(1, int(limits.idle_timeout_s)),
        timeout_graceful_shutdown=max(1, int(limits.grace_s)),
        h11_max_incomplete_event_size=16 << 10,
    )
    return _Server(config)


class _Server(uvicorn.Server):
    """Leaves signals to `serve`."""

    @contextlib.contextmanager
    def capture_signals(self) -> Any:
        yield


def spare_descriptors(connections: int) -> int:
    """As many connections as leave descriptors for the rest; the process's own limit is raised where it can be."""
    spare = _SPARE_DESCRIPTORS + _BACKLOG
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return connections
    if soft < connections + spare:
        most = connections + spare if hard == resource.RLIM_INFINITY else min(hard, connections + spare)
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return max(1, min(connections, soft - spare))


class SparingFilter(logging.Filter):
    """Lets some lines through in ten seconds, and says how many it left out."""

    def __init__(self, lines: int, clock: Callable[[], float]) -> None:
        super().__init__()
        self._lines, self._clock = lines, clock
        self._since, self._seen = clock(), 0

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a line may be written."""
        now = self._clock()
        if now - self._since >= 10.0:
            if self._seen > self._lines:
                record.msg = f"({self._seen - self._lines} lines before this one were left out) {record.getMessage()}"
                record.args = ()
            self._since, self._seen = now, 0
        self._seen += 1
        return self._seen <= self._lines


@contextlib.contextmanager
def sparing_log(lines: int) -> Iterator[None]:
    """No peer can fill the disk by what it makes the server log."""
    filters = [(logging.getLogger(name), SparingFilter(lines, time.monotonic)) for name in _LOGGERS]
    for logger, kept in filters:
        logger.addFilter(kept)
    try:
        yield
    finally:
        for logger, kept in filters:
            logger.removeFilter(kept)
