"""Clients before a host that is silent, slow or talks nonsense: one kind of error, in time, and no receipt believed."""

from __future__ import annotations

import asyncio
import gzip
import json
import re
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from fides_plugins.attestation.evidence import Evidence
from fides_plugins.attestation.refusal import Refusal
from fides_plugins.cli import app
from fides_plugins.client import AsyncTorchServeClient, AsyncTritonClient, TorchServeClient, TritonClient
from fides_plugins.client.trust import EvidenceUrl
from fides_plugins.enclave.providers import DevelopmentProvider
from fides_plugins.enclave.verifier import Verifier, VerifierOptions
from fides_plugins.errors import InputError, ServerError
from fides_plugins.launch.process import wait_until
from fides_plugins.testing import fake_logits, make_bundle
from tests.support.hosts import CLIENTS, ROWS, SILENCE_S, Known, Raw, ask, reply
from tests.support.verifiers import Hardware


@contextmanager
def peak_below(limit: int) -> Iterator[None]:
    """What Python allocates inside stays below so many bytes."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < limit
    finally:
        tracemalloc.stop()


def peak_mb() -> float:
    """The most that was resident since the last call."""
    found = int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024  # type: ignore[index]
    Path("/proc/self/clear_refs").write_text("5")
    return found


@pytest.fixture(scope="module")
def known() -> Known:
    return Known(Hardware())


NONSENSE = {
    "no status line": b"hello\r\n\r\n",
    "half a body": b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{",
    "endless header": b"HTTP/1.1 200 OK\r\nX-Long: " + b"x" * 300_000 + b"\r\n\r\n",
    "bad chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    "nothing": b" ",
    "an error": reply(b"", "500 Internal Server Error"),
    "sent elsewhere": reply(b"", "302 Found", "Location: http://[bad\r\n"),
}


@pytest.mark.parametrize("answer", list(NONSENSE.values()), ids=list(NONSENSE))
def test_nonsense_instead_of_evidence_is_a_server_error(answer: bytes) -> None:
    with Raw(answer) as host, pytest.raises(ServerError, match=r"cannot be fetched|with status"):
        EvidenceUrl(f"http://{host.address}", 2.0).fetch(bytes(32))


@pytest.mark.parametrize("body", [b"{", b"[" * 100_000, b"{}", b" " * (2 << 20)], ids=["half", "deep", "empty", "long"])
def test_documents_that_are_no_evidence_are_refused(body: bytes) -> None:
    with Raw(reply(body)) as host, pytest.raises(Refusal) as caught:
        EvidenceUrl(f"http://{host.address}", 5.0).fetch(bytes(32))
    assert caught.value.code == "evidence-malformed"


# A host may take its time, or send more than anybody asked for: neither is for the client to bear.


@pytest.mark.parametrize("kind", CLIENTS)
def test_an_answer_that_drips_is_given_up_in_time(known: Known, kind: Any) -> None:
    for answer in (reply(b" " * 400), b"HTTP/1.1 200 OK\r\n" + b"X-Drip: drop\r\n" * 100):
        with Raw(answer, pause_s=0.1) as host:
            begin = time.monotonic()
            with pytest.raises(ServerError, match="no answer"):
                ask(known, kind, host.address)
            assert time.monotonic() - begin < 1.5


def test_evidence_that_drips_is_given_up_in_time() -> None:
    for answer in (reply(b"{" * 400), b"HTTP/1.1 200 OK\r\n" + b"X-Drip: drop\r\n" * 100):
        begin = time.monotonic()
        with Raw(answer, pause_s=0.1) as host, pytest.raises(ServerError, match="cannot be fetched"):
            EvidenceUrl(f"http://{host.address}", 0.5).fetch(bytes(32))
        assert time.monotonic() - begin < 1.0


def test_a_question_has_one_deadline_for_all_that_it_asks(known: Known) -> None:
    """Service, receipt, evidence and a repetition: each of them drips."""
    service = Raw(reply(json.dumps(fake_logits(1)[0].tolist()).encode(), more="Connection: close\r\n"))
    with service, Raw(reply(b" " * 400), pause_s=0.1) as verifier:
        begin = time.monotonic()
        options = {"receipt_from": "verifier", "verifier_url": f"http://{verifier.address}"}
        assert ask(known, TorchServeClient, service.address, **options).refusal.code == "receipt-missing"
        assert time.monotonic() - begin < 1.5


GZIP = gzip.compress(bytes(200 << 20), 9)
TOO_MUCH = {
    "compressed": reply(GZIP, more="Content-Encoding: gzip\r\n"),
    "long": reply(bytes(64 << 20)),
    "chunked": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    + (b"100000\r\n" + bytes(1 << 20) + b"\r\n") * 64,
}


@pytest.mark.parametrize("answer", list(TOO_MUCH.values()), ids=list(TOO_MUCH))
def test_answers_of_any_size_cost_a_client_no_more_than_its_bound(known: Known, answer: bytes) -> None:
    with Raw(answer) as host, peak_below(8 << 20):
        for kind in CLIENTS:
            with pytest.raises(ServerError, match=r"no answer: Answer(TooLong|Compressed)|\(Answer"):
                ask(known, kind, host.address, timeout_s=10.0)
        with pytest.raises((ServerError, Refusal)):
            EvidenceUrl(f"http://{host.address}", 10.0).fetch(bytes(32))
    logits = reply(json.dumps(fake_logits(1)[0].tolist()).encode(), more="Connection: close\r\n")
    with Raw(answer) as verifier, Raw(logits) as service, peak_below(8 << 20):
        options = {"receipt_from": "verifier", "verifier_url": f"http://{verifier.address}"}
        found = ask(known, TorchServeClient, service.address, timeout_s=10.0, **options)
    assert "(Answer" in found.verdict.reason[0]


GRPC_HOST = """
import sys, grpc, concurrent.futures as futures
from tritonclient.grpc import service_pb2
from grpc import Compression, unary_unary_rpc_method_handler, method_handlers_generic_handler

def infer(request, context):
    return service_pb2.ModelInferResponse(raw_output_contents=[bytes(200 << 20)])

handler = unary_unary_rpc_method_handler(
    infer, service_pb2.ModelInferRequest.FromString, service_pb2.ModelInferResponse.SerializeToString
)
options = [("grpc.max_send_message_length", -1)]
server = grpc.server(futures.ThreadPoolExecutor(2), options=options, compression=Compression[sys.argv[1]])
service = method_handlers_generic_handler("inference.GRPCInferenceService", {"ModelInfer": handler})
server.add_generic_rpc_handlers((service,))
print(server.add_insecure_port("127.0.0.1:0"), flush=True)
server.start()
sys.stdin.read()
"""


@pytest.mark.parametrize("kind", [TritonClient, AsyncTritonClient])
@pytest.mark.parametrize("compression", ["Gzip", "NoCompression"])
def test_answers_over_grpc_are_bounded_as_well(known: Known, kind: Any, compression: str) -> None:
    command = [sys.executable, "-c", GRPC_HOST, compression]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as host:
        assert host.stdin is not None
        assert host.stdout is not None
        address = f"127.0.0.1:{int(host.stdout.readline())}"
        peak_mb()  # of the tests before this one
        before = peak_mb()
        with pytest.raises(ServerError, match="larger than max"):
            ask(known, kind, address, 20.0, protocol="grpc", output="logits")
        assert peak_mb() - before < 30
        host.stdin.close()


class Slow(Known):
    """Evidence that comes when it is let through."""

    def __init__(self, hardware: Hardware) -> None:
        super().__init__(hardware)
        self.fetched, self.go = 0, threading.Event()

    def fetch(self, challenge: bytes) -> Evidence:
        self.fetched += 1
        if not self.go.wait(SILENCE_S):
            raise ServerError("too slow")
        return super().fetch(challenge)


def test_a_slow_host_holds_up_nobody_who_has_evidence() -> None:
    slow = Slow(Hardware())
    slow.go.set()
    held = slow.trust.current()
    slow.go.clear()
    renewing = threading.Thread(target=slow.trust.renew)
    renewing.start()
    wait_until(lambda: slow.fetched == 2, 10, "The renewal")
    begin = time.monotonic()
    assert slow.trust.current() is held
    assert len(slow.trust.keys()) == 1
    assert slow.trust.renew() is False
    assert time.monotonic() - begin < 0.5
    slow.go.set()
    renewing.join(10)


def test_evidence_is_fetched_once_for_all_who_wait_for_it() -> None:
    slow = Slow(Hardware())
    with ThreadPoolExecutor(8) as pool:
        waiting = [pool.submit(slow.trust.current) for _ in range(8)]
        wait_until(lambda: slow.fetched == 1, 10, "The first")
        slow.go.set()
        assert len({w.result(10).facts.evidence_id for w in waiting}) == 1
    assert slow.fetched == 1


@pytest.mark.parametrize("protocol", ["http", "grpc"])
@pytest.mark.parametrize("answer", [b"", b"hello\r\n\r\n", reply(b"[]"), reply(b'{"outputs": 3}')])
def test_triton_clients_give_one_kind_of_error_in_time(known: Known, protocol: Any, answer: bytes) -> None:
    """The question for the model's outputs comes first, and has the same time-out."""

    async def ask(url: str) -> None:
        client = AsyncTritonClient(
            url, "m", known.bundle, known.trust.policy, protocol=protocol, timeout_s=1.0, **known.options
        )
        async with client:
            await client.infer({"input": ROWS})

    with Raw(answer) as host:
        client = TritonClient(
            host.address, "m", known.bundle, known.trust.policy, protocol=protocol, timeout_s=1.0, **known.options
        )
        begin = time.monotonic()
        with client, pytest.raises(ServerError, match=r"no answer|another form"):
            client.infer({"input": ROWS})
        with pytest.raises(ServerError, match=r"no answer|another form"):
            asyncio.run(ask(host.address))
    assert time.monotonic() - begin < SILENCE_S / 2


@pytest.mark.parametrize("body", [b"[" * 100_000, b"no json", b'{"a": 1}', b'["x"]'])
def test_bodies_of_torchserve_that_cannot_be_decoded_are_server_errors(known: Known, body: bytes) -> None:
    async def ask(url: str) -> None:
        async with AsyncTorchServeClient(url, "m", known.bundle, known.trust.policy, **known.options) as client:
            await client.infer({"input": ROWS})

    with Raw(reply(body, more="Connection: close\r\n")) as host:
        url = f"http://{host.address}"
        with (
            TorchServeClient(url, "m", known.bundle, known.trust.policy, **known.options) as client,
            pytest.raises(ServerError, match="cannot be decoded"),
        ):
            client.infer({"input": ROWS})
        with pytest.raises(ServerError, match="cannot be decoded"):
            asyncio.run(ask(url))


@pytest.mark.parametrize("kind", [TritonClient, AsyncTritonClient])
def test_what_triton_says_instead_of_an_answer_is_one_printable_line(known: Known, kind: Any) -> None:
    said = reply(b'{"error": "no\\u001b[2J\\nWARNING forged"}', "500 Internal Server Error")
    with Raw(said) as host, pytest.raises(ServerError, match=r"gave no answer: no \[2J WARNING forged"):
        ask(known, kind, host.address)


EXCUSES = {
    "its reason": (reply(b'{"error": "request-rate: Too many rows."}', "429 Too Many Requests"), "request-rate: Too"),
    "control characters": (reply(b'{"error": "a\\u001b[2Jb"}', "400 Bad Request"), "unsigned: a [2Jb"),
    "too deep": (reply(b"[" * 100_000), "status 200, no receipt"),
    "another form": (reply(b'{"outputs": [3]}'), "status 200"),
    "a list": (reply(b"[1]", "404 Not Found"), "status 404"),
    "nonsense": (b"hello\r\n\r\n", "no answer (RemoteProtocolError)"),
}


@pytest.mark.parametrize(("answer", "words"), list(EXCUSES.values()), ids=list(EXCUSES))
def test_what_the_verifier_said_instead_of_a_receipt_is_in_the_reason(known: Known, answer: bytes, words: str) -> None:
    logits = json.dumps(fake_logits(1)[0].tolist()).encode()
    with Raw(reply(logits, more="Connection: close\r\n")) as service, Raw(answer) as verifier:
        client = TorchServeClient(
            f"http://{service.address}",
            "m",
            known.bundle,
            known.trust.policy,
            receipt_from="verifier",
            verifier_url=f"http://{verifier.address}",
            **known.options,
        )
        with client:
            found = client.ask({"input": ROWS})
    assert found.refusal is not None
    assert found.refusal.code == "receipt-missing"
    assert found.verdict.status_text.tolist() == ["attacked"]
    assert words in found.verdict.reason[0]


@pytest.mark.parametrize("kind", [TritonClient, AsyncTritonClient])
def test_addresses_by_tls_are_taken_and_others_refused(known: Known, kind: Any) -> None:
    arguments = ("m", known.bundle, known.trust.policy)
    direct = {"receipt_from": "verifier", **known.options}
    kind("https://localhost:9", *arguments, verifier_url="https://localhost:9", **direct)
    for url in ("ftp://localhost:9", "https://", ""):
        with pytest.raises(InputError, match="no address of Triton"):
            kind(url, *arguments, **known.options)
    for url in ("localhost:9", "http://[bad", "http://", "http://a:b", "http://a:99999"):
        with pytest.raises(InputError, match="no address of a verifier"):
            kind("localhost:9", *arguments, verifier_url=url, **direct)
    with pytest.raises(InputError, match="no address of TorchServe"):
        TorchServeClient("localhost:9", *arguments, **known.options)


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_tls_is_spoken_where_the_address_says_so(known: Known, protocol: Any) -> None:
    with Raw(reply(b"{}")) as host:
        client = TritonClient(
            f"https://{host.address}",
            "m",
            known.bundle,
            known.trust.policy,
            protocol=protocol,
            timeout_s=2.0,
            **known.options,
        )
        # A server without TLS is no server for this client; without the s it would be asked, and misunderstood.
        with client, pytest.raises(ServerError, match="no answer"):
            client.infer({"input": ROWS})


def test_infer_says_that_the_service_is_down(tmp_path: Path) -> None:
    """With good evidence, so that the service is what is missing."""
    bundle = make_bundle(tmp_path / "bundle", 10)
    verifier = Verifier(bundle, DevelopmentProvider(), VerifierOptions())
    evidence, rules, rows = tmp_path / "evidence.json", tmp_path / "policy.toml", tmp_path / "rows.npy"
    evidence.write_text(verifier.evidence().to_json())
    rules.write_text(f'[evidence]\nallow_any_client = true\nmodels.fake.bundle_digests = ["{bundle.digest}"]\n')
    np.save(rows, ROWS)
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = ["infer", address, "m", str(rows), "--bundle", str(tmp_path / "bundle"), "--policy", str(rules)]
    command += ["--evidence", str(evidence), "--insecure-accept-development"]
    for server in ("triton-http", "triton-grpc", "torchserve"):
        result = CliRunner().invoke(app, [*command, "--server", server])
        assert isinstance(result.exception, ServerError), result.exception
        assert "gave no answer" in str(result.exception)
