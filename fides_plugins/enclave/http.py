"""The verifier over HTTP: Starlette on uvicorn, with bounds on everything that a peer can make it hold."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import anyio
import h11
import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from uvicorn.protocols.http.h11_impl import H11Protocol

from fides_plugins import __version__, oip
from fides_plugins.attestation.refusal import Refusal
from fides_plugins.attestation.request import from_text
from fides_plugins.enclave import protocol
from fides_plugins.enclave.bounds import request_bounds
from fides_plugins.enclave.limits import ByteBudget, RateLimit
from fides_plugins.enclave.verifier import Verifier
from fides_plugins.errors import FidesError, InputError, ServerError

logger = logging.getLogger("fides_plugins")
#: All that a peer is told of a fault on this side.
_CANNOT_ANSWER = "The verifier cannot answer."
_STATUS = {
    "request-client": 403,
    "request-slow": 408,
    "request-replay": 409,
    "request-evidence": 409,
    "request-size": 413,
    "request-encoding": 415,
    "request-rate": 429,
    "request-busy": 503,
    "request-memory": 503,
}
#: Refusals of a body whose rest is not read, so that the connection cannot be used again.
_UNREAD = ("request-slow", "request-size", "request-encoding")
T = TypeVar("T")


@dataclass(frozen=True)
class ServerLimits:
    """What one server holds at most.

    Attributes
    ----------
    workers:
        Requests that run at once.
    queue:
        Requests that wait for a worker; more are refused at once.
    timeout_s:
        From a complete request to its answer.
    body_bytes, body_timeout_s:
        Size of one body, and the time it may take to arrive. A size of None is what the largest honest batch
        needs, by the bundle (`request_bounds`).
    buffered_bytes:
        All bodies together; at least twice the size of one.
    evidence_rate, evidence_burst:
        Fresh evidence for one peer, per second and at once.
    header_timeout_s:
        Time for a request's headers to arrive.
    connections:
        Connections at once.
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
    connections: int = 512
    grace_s: float = 10.0


def peer_of(host: str) -> bytes:
    """Whom an address belongs to, as far as it tells; IPv6 has addresses to spare, so there a network is one peer."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return b""
    return (getattr(address, "ipv4_mapped", None) or address).packed[:8]


class WorkQueue:
    """Runs the model in a few threads and refuses what would wait too long.

    Attributes
    ----------
    bodies:
        What waits and runs, in bytes, and what is still arriving.
    parsing:
        Held while a request is parsed: what becomes of a body is several times its size, so one at a time.
    """

    def __init__(self, limits: ServerLimits) -> None:
        self.bodies = ByteBudget(limits.buffered_bytes)
        self.parsing = threading.Lock()
        self._limits = limits
        self._pool = ThreadPoolExecutor(limits.workers, thread_name_prefix="fides-verifier")
        self._held = 0

    async def run(self, call: Callable[[], T], held: int = 0) -> T:
        """The call's result.

        Parameters
        ----------
        call:
            What to run.
        held:
            Bytes taken from `bodies` for it; given back when it has ended, however late that is.

        Raises
        ------
        FidesError
            Of the call; ServerError without a reason where the call raised anything else.
        Refusal
            `request-busy` where the queue is full or the time is up. A call that is too late still runs to
            its end and keeps its place, and its answer is dropped.
        """
        if self._held >= self._limits.workers + self._limits.queue:
            self.bodies.give(held)
            raise Refusal("request-busy", "The verifier's queue is full.", "Try again later.")
        self._held += 1
        future = asyncio.get_running_loop().run_in_executor(self._pool, _outcome, call)
        future.add_done_callback(lambda _: self._released(held))
        try:
            outcome = await asyncio.wait_for(asyncio.shield(future), self._limits.timeout_s)
        except asyncio.TimeoutError:
            raise Refusal("request-busy", "The verifier gave no answer in time.", "Try again later.") from None
        try:
            if isinstance(outcome, FidesError):
                raise outcome
            return outcome
        finally:
            # Otherwise this frame, which the error's traceback names, would hold the error: the same cycle.
            del outcome, future

    def _released(self, held: int) -> None:
        self._held -= 1
        self.bodies.give(held)

    def close(self) -> None:
        """Wait for running calls."""
        self._pool.shutdown(wait=True, cancel_futures=True)


def _outcome(call: Callable[[], T]) -> T | FidesError:
    """The call's result or error, without the traceback: a future that holds one is a cycle.

    Python would keep the body that the traceback's frames name until it next collects cycles, and how soon
    that is does not depend on the size of the bodies.
    """
    try:
        return call()
    except FidesError as error:
        return error.with_traceback(None)
    except Exception:
        # The details of an unforeseen error are for the operator only.
        logger.exception("an unforeseen error")
        return ServerError(_CANNOT_ANSWER)


class HttpFront:
    """Routes of the protocol over one verifier."""

    def __init__(self, verifier: Verifier, queue: WorkQueue, limits: ServerLimits) -> None:
        self._verifier = verifier
        self._queue = queue
        self._limits = limits
        # The hardware makes some quotes per second at most: no peer may use them up for the others.
        self._evidence_rate = RateLimit(per_second=limits.evidence_rate, burst=limits.evidence_burst)
        self._bounds = request_bounds(verifier.input, verifier.options.max_rows, limits.body_bytes)
        routes = [
            Route("/v2", self._server),
            Route("/v2/health/live", self._live),
            Route("/v2/health/ready", self._live),
            Route("/v2/fides/evidence", self._evidence),
            Route("/v2/models/{model}", self._model),
            Route("/v2/models/{model}/ready", self._ready),
            Route("/v2/models/{model}/infer", self._infer, methods=["POST"]),
            Route("/v2/models/{model}/versions/{version}", self._model),
            Route("/v2/models/{model}/versions/{version}/ready", self._ready),
            Route("/v2/models/{model}/versions/{version}/infer", self._infer, methods=["POST"]),
        ]
        faults: Any = {FidesError: self._refused, ClientDisconnect: self._gone, Exception: self._unforeseen}
        self.app = Starlette(routes=routes, exception_handlers=faults)

    async def _live(self, request: Request) -> Response:
        return Response()

    async def _server(self, request: Request) -> Response:
        return JSONResponse(
            {"name": "fides-verifier", "version": __version__, "extensions": ["binary_tensor_data", "fides_receipts"]}
        )

    async def _model(self, request: Request) -> Response:
        protocol.check_version(request.path_params.get("version", ""))
        return JSONResponse(protocol.model_metadata(self._verifier, request.path_params["model"]))

    async def _ready(self, request: Request) -> Response:
        await self._model(request)
        return Response()

    async def _evidence(self, request: Request) -> Response:
        text = request.query_params.get("challenge", "")
        challenge = from_text(text, "request", 64) if text else b""
        if challenge:
            self._evidence_rate.take(peer_of(request.client.host if request.client is not None else ""))
        document = await self._queue.run(lambda: self._verifier.evidence(challenge).to_json())
        return Response(document, media_type="application/json")

    async def _infer(self, request: Request) -> Response:
        protocol.check_version(request.path_params.get("version", ""))
        if request.headers.get("content-encoding", "identity") != "identity":
            raise Refusal("request-encoding", "Compressed bodies are not read.")
        length = oip.read_length(request.headers.get(oip.JSON_LENGTH))
        model = request.path_params["model"]
        body = await self._body(request)
        data, headers = await self._queue.run(lambda: self._answer(model, body, length), held=len(body))
        return Response(data, headers=headers)

    def _answer(self, model: str, body: bytes, json_length: int | None) -> oip.Body:
        with self._queue.parsing:
            parsed = protocol.parse_request(body, json_length, self._bounds)
        return protocol.infer(self._verifier, model, parsed)

    async def _body(self, request: Request) -> bytes:
        """The body, within size and time; its bytes stay taken from the queue's `bodies`."""
        limit = self._bounds.body_bytes
        declared = request.headers.get("content-length", "0")
        if declared.isascii() and declared.isdigit() and int(declared) > limit:
            raise Refusal("request-size", f"The body is longer than {limit} bytes.")
        chunks: list[bytes] = []
        size = 0
        try:
            # One deadline for the whole body: a peer that sends a byte now and then gains nothing.
            with anyio.fail_after(self._limits.body_timeout_s):
                async for chunk in request.stream():
                    if size + len(chunk) > limit:
                        raise Refusal("request-size", f"The body is longer than {limit} bytes.")
                    self._queue.bodies.take(len(chunk))
                    size += len(chunk)
                    chunks.append(chunk)
        except BaseException as error:
            self._queue.bodies.give(size)
            if isinstance(error, TimeoutError):
                raise Refusal("request-slow", "The body did not arrive in time.") from None
            raise
        return b"".join(chunks)

    async def _refused(self, request: Request, error: Exception) -> Response:
        if isinstance(error, Refusal):
            headers = {"connection": "close"} if error.code in _UNREAD else None
            return _problem(_STATUS.get(error.code, 400), error.code, str(error), headers)
        if isinstance(error, InputError):
            return _problem(400, "request-input", str(error))
        # Broken hardware or bundle: the operator's log has the details, the peer gets none.
        logger.error("the verifier cannot answer: %s", error)
        return _problem(500, "verifier", _CANNOT_ANSWER)

    async def _unforeseen(self, request: Request, error: Exception) -> Response:
        """The answer to an unforeseen error; Starlette raises it again, and uvicorn logs it."""
        return _problem(500, "verifier", _CANNOT_ANSWER)

    async def _gone(self, request: Request, error: Exception) -> Response:
        return Response(status_code=499)


def _problem(status: int, code: str, message: str, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse({"error": message, "code": code}, status_code=status, headers=headers)


class _HeaderDeadline(H11Protocol):
    """uvicorn's HTTP/1.1 with a deadline for headers, which it lacks: a slow sender would hold a connection."""

    header_timeout_s = 10.0

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._waiting: asyncio.TimerHandle | None = None
        self._wait()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        # IDLE after data: headers have begun and are not complete.
        if self.conn.their_state is h11.IDLE:
            self._wait()
        else:
            self._stop()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        super().connection_lost(exc)

    def _wait(self) -> None:
        if self._waiting is None:
            self._waiting = self.loop.call_later(self.header_timeout_s, self._give_up)

    def _stop(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None

    def _give_up(self) -> None:
        self._waiting = None
        if not self.transport.is_closing():
            self.transport.close()


def make_server(front: HttpFront, limits: ServerLimits) -> uvicorn.Server:
    """A uvicorn server that is not started yet and has no socket."""
    protocol = type("HeaderDeadline", (_HeaderDeadline,), {"header_timeout_s": limits.header_timeout_s})
    config = uvicorn.Config(
        front.app,
        http=protocol,
        ws="none",
        lifespan="off",
        loop="asyncio",
        log_config=None,
        access_log=False,
        server_header=False,
        limit_concurrency=limits.connections,
        backlog=256,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=max(1, int(limits.grace_s)),
        h11_max_incomplete_event_size=16 << 10,
    )
    return _Server(config)


class _Server(uvicorn.Server):
    """Leaves signals to `serve`."""

    @contextlib.contextmanager
    def capture_signals(self) -> Any:
        yield
