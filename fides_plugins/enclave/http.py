"""The verifier over HTTP: Starlette on uvicorn, with bounds on everything that a peer can make it hold."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import anyio
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from fides_plugins import __version__, oip
from fides_plugins.attestation.refusal import Refusal
from fides_plugins.attestation.request import from_text
from fides_plugins.enclave import protocol
from fides_plugins.enclave.bounds import request_bounds
from fides_plugins.enclave.connections import ServerLimits, peer_of
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
        self._held: Counter[bytes] = Counter()

    async def run(self, call: Callable[[], T], held: int = 0, peer: bytes = b"") -> T:
        """The call's result.

        Parameters
        ----------
        call:
            What to run.
        held, peer:
            Bytes taken from `bodies` for it, given back when it has ended, however late that is; and who asks.

        Raises
        ------
        FidesError
            Of the call; ServerError without a reason where the call raised anything else.
        Refusal
            `request-busy` where the queue is full, or the peer has half of it, or the time is up. A call that is
            too late still runs to its end and keeps its place, and its answer is dropped.
        """
        limits = self._limits
        full = self._held.total() >= limits.workers + limits.queue
        if full or self._held[peer] >= limits.workers + (limits.queue + 1) // 2:
            self.bodies.give(held, peer)
            raise Refusal("request-busy", "The verifier's queue is full.", "Try again later.")
        self._held[peer] += 1
        future = asyncio.get_running_loop().run_in_executor(self._pool, _outcome, call)
        future.add_done_callback(lambda _: self._released(held, peer))
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

    def _released(self, held: int, peer: bytes) -> None:
        self._held[peer] -= 1
        if not self._held[peer]:
            del self._held[peer]
        self.bodies.give(held, peer)

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
            self._evidence_rate.take(_peer(request))
        document = await self._queue.run(lambda: self._verifier.evidence(challenge).to_json(), peer=_peer(request))
        return Response(document, media_type="application/json")

    async def _infer(self, request: Request) -> Response:
        protocol.check_version(request.path_params.get("version", ""))
        if request.headers.get("content-encoding", "identity") != "identity":
            raise Refusal("request-encoding", "Compressed bodies are not read.")
        length = oip.read_length(request.headers.get(oip.JSON_LENGTH))
        model = request.path_params["model"]
        body = await self._body(request)
        data, headers = await self._queue.run(
            lambda: self._answer(model, body, length), held=len(body), peer=_peer(request)
        )
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
                    self._queue.bodies.take(len(chunk), _peer(request))
                    size += len(chunk)
                    chunks.append(chunk)
        except BaseException as error:
            self._queue.bodies.give(size, _peer(request))
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


def _peer(request: Request) -> bytes:
    return peer_of(request.client.host if request.client is not None else "")


def _problem(status: int, code: str, message: str, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse({"error": message, "code": code}, status_code=status, headers=headers)
