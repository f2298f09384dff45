"""`fides serve-verifier` as a process of its own: under load from good and bad clients, its memory, its end."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.http
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fides_plugins.attestation.clients import ClientSet
from fides_plugins.attestation.evidence import Evidence
from fides_plugins.attestation.judge import Judge
from fides_plugins.attestation.policy import EvidencePolicy
from fides_plugins.attestation.refusal import Refusal
from fides_plugins.attestation.request import SignedRequest
from fides_plugins.attestation.tensors import tensor_digest
from fides_plugins.attestation.wire import PARAMETER, RECEIPT_OUTPUT
from fides_plugins.bundle import Bundle
from fides_plugins.client.receipts import ReceiptChecker
from fides_plugins.client.trust import EvidenceUrl, Trust
from fides_plugins.enclave.connections import ServerLimits
from fides_plugins.enclave.http import WorkQueue
from fides_plugins.enclave.providers import DevelopmentProvider
from fides_plugins.enclave.verifier import Verifier, VerifierOptions
from fides_plugins.launch.process import wait_until
from tests.support.verifier_process import Process, body, checker, image, receipt_in
from tests.support.verifiers import IDENTITY, IDENTITY_PUBLIC, RunningVerifier, digits_bundle, models_of

pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("ignore::fides_plugins.attestation.verify.InsecureEvidenceWarning"),
]
#: The issue's limit, in MiB.
MEMORY_MB = 150
#: Bad clients among the honest ones may add what the server holds of their bodies, and no more.
PEAK_MB = 250
LOAD_SECONDS = 12.0


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return digits_bundle(tmp_path_factory.mktemp("verifier") / "bundle")


@pytest.fixture(scope="module")
def folder(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return next(p for p in tmp_path_factory.getbasetemp().glob("verifier*/bundle"))


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Process]:
    running = Process(folder, "--rate", "1000000", "--queue", "128", "--max-body-mb", "2")
    yield running
    running.stop()


# Kinds of bad clients. Each does one bad thing and returns what the server made of it.


def _connect(server: Process) -> socket.socket:
    host, port = server.http.split(":")
    return socket.create_connection((host, int(port)), timeout=20)


def _head(length: int) -> bytes:
    return (
        f"POST /v2/models/digits/infer HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n"
        "Content-Type: application/json\r\n\r\n"
    ).encode()


def slow_body(server: Process, rng: random.Random, stop: threading.Event) -> str:
    with _connect(server) as connection:
        connection.sendall(_head(5000))
        for _ in range(40):
            if stop.wait(0.2):
                return "given up"
            try:
                connection.sendall(b" ")
            except OSError:
                return "closed"
    return "given up"


def slow_headers(server: Process, rng: random.Random, stop: threading.Event) -> str:
    with _connect(server) as connection:
        for byte in _head(10):
            try:
                connection.sendall(bytes([byte]))
            except OSError:
                return "closed"
            if stop.wait(0.1):
                return "given up"
    return "given up"


def huge(server: Process, rng: random.Random, stop: threading.Event) -> str:
    chunked = rng.random() < 0.5
    with _connect(server) as connection:
        try:
            if chunked:
                connection.sendall(
                    b"POST /v2/models/digits/infer HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
                )
                for _ in range(40):
                    connection.sendall(b"40000\r\n" + bytes(0x40000) + b"\r\n")
            else:
                connection.sendall(_head(50 << 20))
                for _ in range(40):
                    connection.sendall(bytes(1 << 18))
        except OSError:
            return "closed"
        try:
            return connection.recv(100).split(b" ", 2)[1].decode()
        except (OSError, IndexError):
            return "closed"


def malformed(server: Process, rng: random.Random, stop: threading.Event) -> str:
    data = rng.choice(
        (b"", b"{", b"[" * 100_000, b"\xff" * 500, b'{"inputs": [{"name": "image"}]}', rng.randbytes(2000))
    )
    headers = rng.choice(({}, {"Inference-Header-Content-Length": rng.choice(("9" * 9, "-1", "x", "1"))}))
    reply = httpx.post(f"http://{server.http}/v2/models/digits/infer", content=data, headers=headers, timeout=30)
    assert receipt_in(reply) is None
    return str(reply.status_code)


def aborted(server: Process, rng: random.Random, stop: threading.Event) -> str:
    with _connect(server) as connection:
        connection.sendall(_head(5000) + b"{" * rng.randrange(4000))
        if rng.random() < 0.5:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
    return "aborted"


def unsigned(server: Process, rng: random.Random, stop: threading.Event) -> str:
    """Well-formed requests of nobody in particular: no answer without a signature, and none in the clear."""
    text = rng.choice(("", "AAAA", "A" * 900, "no base64!"))
    data, headers = body(text, image(1))
    reply = httpx.post(f"http://{server.http}/v2/models/digits/infer", content=data, headers=headers, timeout=30)
    assert "outputs" not in reply.json()
    return str(reply.status_code)


def amplifying(server: Process, rng: random.Random, stop: threading.Event) -> str:
    """Bodies within the limit that a parser would make some twenty times as large."""
    unit = rng.choice((b"[],", b"{},"))
    data = b'{"inputs":[' + unit * ((2 << 20) // 3 - 20) + unit[:-1] + b"]}"
    reply = httpx.post(f"http://{server.http}/v2/models/digits/infer", content=data, timeout=30)
    return str(reply.status_code)


BAD = (slow_body, slow_headers, huge, malformed, aborted, unsigned, amplifying)


def test_honest_requests_are_answered_among_bad_ones(server: Process, bundle: Bundle) -> None:
    """32 clients at once: 12 honest, 20 that are slow, huge, malformed, aborted, unsigned or amplifying."""
    receipts = checker(server, bundle)
    receipts.trust.current()
    stop = threading.Event()
    outcomes: Counter[str] = Counter()
    failures: list[BaseException] = []
    memory: list[float] = []
    answered = [0] * 12

    def honest(index: int) -> None:
        with httpx.Client(timeout=60) as client:
            while not stop.is_set():
                tensor = image(answered[index])
                pending = receipts.begin(tensor)
                data, headers = body(pending.text, tensor)
                reply = client.post(f"http://{server.http}/v2/models/digits/infer", content=data, headers=headers)
                assert reply.status_code == 200, reply.text
                reference = receipts.check(pending, receipt_in(reply), np.zeros((1, 10), np.float32))
                assert reference.shape == (1, 10)
                answered[index] += 1

    def bad(index: int) -> None:
        rng = random.Random(index)
        kind = BAD[index % len(BAD)]
        while not stop.is_set():
            outcomes[f"{kind.__name__}: {kind(server, rng, stop)}"] += 1
            stop.wait(0.01)

    def guarded(work: Any, index: int) -> None:
        try:
            work(index)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(honest, i)) for i in range(12)]
    threads += [threading.Thread(target=guarded, args=(bad, i)) for i in range(20)]
    for thread in threads:
        thread.start()
    begin = time.monotonic()
    while time.monotonic() - begin < LOAD_SECONDS:
        time.sleep(0.5)
        memory.append(server.memory_mb())
    stop.set()
    for thread in threads:
        thread.join(60)
    assert not any(t.is_alive() for t in threads)
    assert failures == []
    assert min(answered) >= 3
    # Everything bad was tried, and nothing bad was answered with success.
    assert {o.split(":")[0] for o in outcomes} == {b.__name__ for b in BAD}
    assert not any(o.endswith(": 200") for o in outcomes)
    half = len(memory) // 2
    growth = max(memory[half:]) - max(memory[:half])
    print(f"\nanswered {sum(answered)}; {dict(outcomes)}; memory {memory[0]:.0f}..{max(memory):.0f} MiB, +{growth:.1f}")
    print(f"peak {server.peak_mb():.0f} MiB")
    assert growth < 8
    assert server.peak_mb() < PEAK_MB
    assert server.process.poll() is None


def test_resident_memory_with_a_digits_bundle(folder: Path, bundle: Bundle) -> None:
    """A verifier of its own, so that nothing but honest requests has touched it."""
    process = Process(folder)
    try:
        receipts = checker(process, bundle)
        started = process.memory_mb()
        with httpx.Client(timeout=60) as client:
            for seed in range(50):
                tensor = image(seed)
                pending = receipts.begin(tensor)
                data, headers = body(pending.text, tensor)
                reply = client.post(f"http://{process.http}/v2/models/digits/infer", content=data, headers=headers)
                receipts.check(pending, receipt_in(reply), tensor)
        used = process.memory_mb()
    finally:
        assert process.stop() == 0
    print(f"\nresident: {started:.0f} MiB at start, {used:.0f} MiB after 50 requests")
    assert used <= MEMORY_MB


def test_ordinary_clients_of_the_protocol_can_speak_to_it(server: Process, bundle: Bundle) -> None:
    receipts = checker(server, bundle)
    tensor = image(3)
    with tritonclient.http.InferenceServerClient(server.http) as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("digits")
        assert not client.is_model_ready("other")
        assert client.get_model_metadata("digits")["name"] == "digits"
        sent = tritonclient.http.InferInput("image", list(tensor.shape), "FP32")
        sent.set_data_from_numpy(tensor)
        pending = receipts.begin(tensor)
        result = client.infer("digits", [sent], parameters={PARAMETER: pending.text})
        reference = receipts.check(pending, result.as_numpy(RECEIPT_OUTPUT)[0].decode(), tensor)
        assert reference.sum() == pytest.approx(1, abs=1e-5)
        with pytest.raises(Exception, match="nonce was used before"):
            client.infer("digits", [sent], parameters={PARAMETER: pending.text})
        with pytest.raises(Exception, match="fides_request is missing"):
            client.infer("digits", [sent])
        with pytest.raises(Exception, match="no model"):
            client.infer("other", [sent])


def test_slow_peers_are_cut_off(bundle: Bundle) -> None:
    limits = ServerLimits(header_timeout_s=0.5, body_timeout_s=0.5)
    verifier = Verifier(bundle, DevelopmentProvider(), VerifierOptions())
    with RunningVerifier(verifier, limits) as running:
        host, port = running.http.split(":")
        for start, answer in ((b"POST /v2/models/digits/infer HTTP/1.1\r\nHo", b""), (_head(500), b"HTTP/1.1 408")):
            with socket.create_connection((host, int(port)), timeout=10) as connection:
                connection.sendall(start)
                begin = time.monotonic()
                assert connection.recv(12) == answer
                assert time.monotonic() - begin < 5


def test_a_full_queue_and_a_late_answer_are_refused_at_once(bundle: Bundle) -> None:
    release = threading.Event()

    async def scenario() -> list[str]:
        queue = WorkQueue(ServerLimits(workers=1, queue=1, timeout_s=0.3))
        calls = [asyncio.create_task(queue.run(lambda: release.wait(10))) for _ in range(2)]
        await asyncio.sleep(0.05)
        messages = []
        with pytest.raises(Refusal) as caught:
            await queue.run(lambda: True)
        messages.append(str(caught.value))
        for call in calls:
            with pytest.raises(Refusal) as caught:
                await call
            messages.append(str(caught.value))
        release.set()
        for _ in range(100):  # late calls give their places back as soon as their work has ended
            with contextlib.suppress(Refusal):
                assert await queue.run(lambda: True)
                break
            await asyncio.sleep(0.1)
        else:
            raise AssertionError("the queue stayed full")
        queue.close()
        return messages

    full, *late = asyncio.run(scenario())
    assert "queue is full" in full
    assert all("no answer in time" in m for m in late)


def test_it_stops_gracefully_and_finishes_what_runs(folder: Path, bundle: Bundle) -> None:
    process = Process(folder)
    receipts = checker(process, bundle)
    results: list[bool] = []
    begun, stopping = threading.Barrier(5), threading.Event()

    def ask(seed: int) -> None:
        tensor = np.repeat(image(seed), 256, axis=0)
        pending = receipts.begin(tensor)
        data, headers = body(pending.text, tensor)

        def halves() -> Iterator[bytes]:
            yield data[:1000]
            begun.wait(30)
            stopping.wait(30)
            yield data[1000:]

        headers["Content-Length"] = str(len(data))
        url = f"http://{process.http}/v2/models/digits/infer"
        reply = httpx.post(url, content=halves(), headers=headers, timeout=60)
        receipts.check(pending, receipt_in(reply), tensor)
        results.append(True)

    receipts.trust.current()
    threads = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    begun.wait(30)
    # Connections are taken in their order: once this one is answered, the server has the other four.
    assert httpx.get(f"http://{process.http}/v2/health/live").status_code == 200
    threading.Timer(0.3, stopping.set).start()  # the rest of the bodies comes when it has been told to stop
    assert process.stop() == 0
    for thread in threads:
        thread.join(60)
    assert results == [True] * 4
    assert not any("Traceback" in line for line in process.errors), process.errors


def test_it_warns_where_nothing_is_protected(server: Process) -> None:
    # The warnings follow the line that says where it listens.
    wait_until(lambda: any("no hardware protects this verifier" in line for line in server.errors), 10, "The warning")
    assert not any("host can ask" in line for line in server.errors)


def test_it_answers_the_clients_of_a_signed_set(folder: Path, bundle: Bundle, tmp_path: Path) -> None:
    operator, now = Ed25519PrivateKey.generate(), int(time.time())
    chosen = ClientSet(id="prod", serial=1, not_before=now - 60, not_after=now + 60, clients=(IDENTITY_PUBLIC,))
    (tmp_path / "clients").write_text(chosen.sign(operator) + "\n")
    process = Process(folder, clients=("--client-set", str(tmp_path / "clients")))
    try:
        rule = {"id": "prod", "operator": operator.public_key().public_bytes_raw().hex()}
        rules = EvidencePolicy.model_validate({"models": models_of(bundle), "client_set": rule})
        trust = Trust(rules, EvidenceUrl(f"http://{process.http}"), insecure_development=True)
        for identity, status in ((IDENTITY, 200), (operator, 403)):
            pending = ReceiptChecker(trust, identity, "hpke", bundle).begin(image(1))
            data, headers = body(pending.text, image(1))
            url = f"http://{process.http}/v2/models/digits/infer"
            assert httpx.post(url, content=data, headers=headers).status_code == status
    finally:
        assert process.stop() == 0


def test_its_development_receipts_need_the_flag(server: Process, bundle: Bundle) -> None:
    rules = EvidencePolicy.model_validate({"models": models_of(bundle), "allow_any_client": True})
    trust = Trust(rules, EvidenceUrl(f"http://{server.http}"))
    with pytest.raises(Refusal) as caught:
        ReceiptChecker(trust, IDENTITY, "hpke", bundle).begin(image(1))
    assert caught.value.code == "evidence-development"


def test_its_errors_show_no_paths_or_tracebacks(server: Process, bundle: Bundle) -> None:
    document = Evidence.from_json(httpx.get(f"http://{server.http}/v2/fides/evidence").content)
    assert document.statement is not None
    tensor = np.zeros((1, 3), np.float32)
    request = SignedRequest(
        key_id=document.statement.key_id,
        **vars(Judge.of(bundle)),
        input_digest=tensor_digest(tensor),
        scheme="hpke",
        client_key=X25519PrivateKey.generate().public_key().public_bytes_raw(),
    )
    data, headers = body(request.encode(IDENTITY), tensor)
    for reply in (
        httpx.post(f"http://{server.http}/v2/models/digits/infer", content=data, headers=headers),
        httpx.get(f"http://{server.http}/v2/models/other"),
        httpx.get(f"http://{server.http}/v2/fides/evidence?challenge=x"),
        httpx.post(f"http://{server.http}/v2/models/digits/infer", content=b"", headers={"content-encoding": "gzip"}),
    ):
        assert 400 <= reply.status_code < 500
        assert set(reply.json()) == {"error", "code"}
        assert "/" not in reply.json()["error"]
        assert "Traceback" not in reply.text
