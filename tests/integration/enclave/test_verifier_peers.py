"""What one peer can take from the others: evidence, connections, idle time, the log. Each has a loopback address."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from fides_plugins.attestation.refusal import Refusal
from fides_plugins.attestation.request import to_text
from fides_plugins.attestation.verify import new_challenge
from fides_plugins.enclave.connections import ServerLimits, SparingFilter, make_server, peer_of, spare_descriptors
from fides_plugins.enclave.http import WorkQueue
from fides_plugins.enclave.providers import DevelopmentProvider
from fides_plugins.enclave.verifier import Verifier, VerifierOptions
from fides_plugins.testing import memory_bundle
from tests.support.verifier_process import Process
from tests.support.verifiers import RunningVerifier, digits_bundle

pytestmark = pytest.mark.integration
GREEDY, HONEST = "127.0.0.9", "127.0.0.1"


@pytest.fixture
def few_descriptors() -> Iterator[None]:
    """1,024 for every process that starts here, as most systems give."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture
def running(request: pytest.FixtureRequest) -> Iterator[RunningVerifier]:
    limits = getattr(request, "param", None)
    with RunningVerifier(Verifier(memory_bundle(), DevelopmentProvider(), VerifierOptions()), limits) as verifier:
        yield verifier


def connect(address: str, source: str = GREEDY) -> socket.socket:
    host, port = address.split(":")
    return socket.create_connection((host, int(port)), timeout=10, source_address=(source, 0))


def test_no_peer_uses_up_the_evidence_of_the_others(running: RunningVerifier) -> None:
    url = f"http://{running.http}/v2/fides/evidence"

    def ask(source: str, times: int) -> Counter[int]:
        transport = httpx.HTTPTransport(local_address=source)
        with httpx.Client(transport=transport, timeout=30) as client:
            return Counter(
                client.get(url, params={"challenge": to_text(new_challenge())}).status_code for _ in range(times)
            )

    assert ask("127.0.0.9", 400)[429] > 100
    assert ask("127.0.0.1", 20) == {200: 20}
    assert httpx.get(url).status_code == 200


def closed_within(connection: socket.socket, seconds: float) -> bool:
    """Whether the other side closes; what it says first is read."""
    connection.settimeout(seconds)
    try:
        while connection.recv(1 << 16):
            pass
    except TimeoutError:
        return False
    except OSError:
        pass
    return True


@pytest.mark.usefixtures("few_descriptors")
def test_connections_without_a_byte_stop_nobody_else(tmp_path: Path) -> None:
    digits_bundle(tmp_path / "bundle")
    process = Process(tmp_path / "bundle")
    with contextlib.ExitStack() as held:
        held.callback(process.stop)
        for _ in range(700):
            held.enter_context(connect(process.http))
        begin = time.monotonic()
        for _ in range(20):
            assert httpx.get(f"http://{process.http}/v2/fides/evidence", timeout=5).status_code == 200
        assert time.monotonic() - begin < 5
        assert len(process.errors) < 30


@pytest.mark.parametrize("running", [ServerLimits(header_timeout_s=0.5, idle_timeout_s=0.5)], indirect=True)
@pytest.mark.parametrize(
    "start",
    [
        b"",
        b"GET /v2 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /v2 HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\nx",
        b"POST /nowhere HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n",
    ],
    ids=["silent", "idle", "a body nobody asked for", "endless chunks"],
)
def test_what_asks_nothing_is_cut_off_though_it_drips(running: RunningVerifier, start: bytes) -> None:
    with connect(running.http) as connection:
        connection.sendall(start)
        stop = threading.Event()

        def drip() -> None:
            with contextlib.suppress(OSError):
                while start.endswith((b"x", b"x\r\n")) and not stop.wait(0.1):
                    connection.sendall(b"x" if start.endswith(b"x") else b"1\r\nx\r\n")

        dripping = threading.Thread(target=drip)
        dripping.start()
        begin = time.monotonic()
        assert closed_within(connection, 5)
        stop.set()
        dripping.join(5)
        assert time.monotonic() - begin < 3


def test_an_answer_that_nobody_takes_is_given_up() -> None:
    async def large(request: Request) -> Response:
        return Response(bytes(64 << 20))

    async def scenario() -> int:
        server = make_server(Starlette(routes=[Route("/", large)]), ServerLimits(header_timeout_s=0.3))
        with socket.create_server(("127.0.0.1", 0)) as listener:
            task = asyncio.create_task(server.serve(sockets=[listener]))
            while not server.started:
                await asyncio.sleep(0.01)
            with socket.create_connection(listener.getsockname()) as idle:
                idle.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
                await asyncio.sleep(0.2)
                assert len(server.server_state.connections) == 1
                await asyncio.sleep(1.0)
                left = len(server.server_state.connections)
            server.should_exit = True
            await task
        return left

    assert asyncio.run(scenario()) == 0


def test_a_flood_of_nonsense_writes_few_lines(running: RunningVerifier, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "uvicorn.error")
    for _ in range(300):
        with connect(running.http) as connection:
            connection.sendall(b"nonsense\r\n\r\n")
            assert b"400" in connection.recv(100)
    assert 1 <= len(caplog.records) <= 25


def test_the_log_says_how_much_it_left_out(caplog: pytest.LogCaptureFixture) -> None:
    """On a logger of its own: other servers of this process may spare theirs."""
    now, logger = [0.0], logging.getLogger("tests.sparing")
    sparing = SparingFilter(3, lambda: now[0])
    logger.addFilter(sparing)
    for _ in range(10):
        logger.warning("again")
    now[0] = 11.0
    logger.warning("later")
    logger.removeFilter(sparing)
    assert [r.getMessage() for r in caplog.records] == ["again"] * 3 + ["(7 lines before this one were left out) later"]


def test_no_peer_fills_the_queue_alone() -> None:
    async def scenario() -> None:
        release = threading.Event()
        queue = WorkQueue(ServerLimits(workers=1, queue=4))
        greedy = [asyncio.create_task(queue.run(lambda: release.wait(10), peer=b"greedy")) for _ in range(20)]
        await asyncio.sleep(0.05)
        honest = [asyncio.create_task(queue.run(lambda: True, peer=b"honest")) for _ in range(2)]
        await asyncio.sleep(0.05)
        release.set()
        assert await asyncio.gather(*honest) == [True] * 2
        found = await asyncio.gather(*greedy, return_exceptions=True)
        assert [f for f in found if f is True] == [True] * 3
        assert {f.code for f in found if isinstance(f, Refusal)} == {"request-busy"}
        queue.close()

    asyncio.run(scenario())


def test_peers_are_addresses_and_networks_of_ipv6() -> None:
    assert peer_of("127.0.0.1") == peer_of("::ffff:127.0.0.1") != peer_of("127.0.0.2")
    assert peer_of("2001:db8::1") == peer_of("2001:db8:0:0:ffff::1%eth0") != peer_of("2001:db8:0:1::1")
    assert peer_of("testclient") == b""


def test_connections_leave_descriptors_for_the_rest() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (512, hard))
        assert spare_descriptors(512) == 512
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= 512 + 256
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
