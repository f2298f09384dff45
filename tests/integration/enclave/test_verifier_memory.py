"""`fides serve-verifier` under unsigned requests that parsers would make large: its peak, and what it answers."""

from __future__ import annotations

import http.client
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from fides_plugins.attestation.wire import PARAMETER, RECEIPT_OUTPUT
from fides_plugins.bundle import Bundle, InputSpec
from fides_plugins.enclave.bounds import request_bounds
from fides_plugins.enclave.providers import DevelopmentProvider
from fides_plugins.enclave.verifier import Verifier, VerifierOptions
from fides_plugins.oip import JSON_LENGTH, first_text, read_answer
from tests.support.verifier_process import Process, body, checker
from tests.support.verifiers import IMAGE_28, RunningVerifier, digits_bundle

pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("ignore::fides_plugins.attestation.verify.InsecureEvidenceWarning"),
]
#: deploy/ sets 512 MB.
PEAK_MB = 400
BOUNDS = request_bounds(InputSpec(name="image", dtype="float32", shape=(None, *IMAGE_28)), 1024)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("memory") / "bundle"


@pytest.fixture(scope="module")
def bundle(folder: Path) -> Bundle:
    return digits_bundle(folder)


@pytest.fixture
def server(folder: Path, bundle: Bundle) -> Iterator[Process]:
    running = Process(folder, "--rate", "1000000")
    yield running
    assert running.stop() == 0
    assert not any("Traceback" in line for line in running.errors)


def filled(head: bytes, unit: bytes, tail: bytes, count: int | None = None) -> bytes:
    """JSON of the largest size: as many units as are wanted or fit, then blanks."""
    size = BOUNDS.json_bytes - 100
    text = head + unit * (count or (size - len(head) - len(tail)) // len(unit)) + tail
    return text.ljust(size)


def json_bodies() -> dict[str, bytes]:
    data = b'{"inputs":[{"name":"image","shape":[1024,1,28,28],"datatype":"FP32","data":['
    return {
        "issue": b'{"inputs":[' + b"[]," * ((8 << 20) // 3) + b"[]]}",
        "lists": filled(b'{"inputs":[', b"[],", b"[]]}"),
        "objects": filled(b'{"x":[', b"{},", b"{}]}"),
        "as many lists as allowed": filled(b'{"inputs":[', b"[],", b"[]]}", BOUNDS.lists),
        "as many numbers as allowed": filled(data, b"0.12345678901234567890,", b"1]}]}", BOUNDS.values - 1),
        "as many texts as allowed": filled(data, b'"abcd",', b"1]}]}", BOUNDS.values - 1),
        "one text": filled(b'{"id":"', b"a", b'"}'),
        "wide text": filled(b'{"id":"\\ud83d\\ude00', b"a", b'"}'),
        "a wide text among data": filled(data + b'"' + b"a" * 10_000_000 + b'",', b'"a",', b"1]}]}", 200),
    }


def at_once(count: int, call: Callable[[], str]) -> Counter[str]:
    """What became of so many calls."""
    outcomes: Counter[str] = Counter()
    threads = [threading.Thread(target=lambda: outcomes.update([call()])) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert outcomes.total() == count
    return outcomes


def post(server: Process, data: bytes) -> str:
    host, port = server.http.split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=100)
    try:
        connection.request("POST", "/v2/models/digits/infer", body=data)
        return str(connection.getresponse().status)
    except OSError:
        return "closed"  # refused while it was still being sent
    finally:
        connection.close()


@pytest.mark.slow
def test_the_peak_stays_bounded(server: Process) -> None:
    for name, data in json_bodies().items():
        outcomes = at_once(7, lambda data=data: post(server, data))  # type: ignore[misc]
        print(f"{name}: {dict(outcomes)}, peak {server.peak_mb():.0f} MiB")
        assert set(outcomes) <= {"400", "503", "closed"}
    assert server.peak_mb() < PEAK_MB


def test_the_largest_honest_batches_are_answered(server: Process, bundle: Bundle) -> None:
    receipts = checker(server, bundle)
    tensor = -np.random.default_rng(0).uniform(1e-6, 1e-5, (1024, *IMAGE_28)).astype(np.float32)
    answers = []
    for form in ("binary", "json"):
        pending = receipts.begin(tensor)
        data, headers = body(pending.text, tensor)
        if form == "json":
            entry = {"name": "image", "shape": list(tensor.shape), "datatype": "FP32", "data": tensor.tolist()}
            data, headers = json.dumps({"parameters": {PARAMETER: pending.text}, "inputs": [entry]}).encode(), {}
        connection = http.client.HTTPConnection(*server.http.split(":"), timeout=100)  # type: ignore[arg-type]
        connection.request("POST", "/v2/models/digits/infer", body=data, headers=headers)
        reply = connection.getresponse()
        outputs = read_answer(reply.read(), reply.headers.get(JSON_LENGTH))
        connection.close()
        answers.append(receipts.check(pending, first_text(outputs, RECEIPT_OUTPUT), tensor))
    assert {a.shape for a in answers} == {(1024, 10)}


def test_what_nobody_foresaw_is_logged_and_not_told(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("secret of the inside")

    with RunningVerifier(Verifier(bundle, DevelopmentProvider(), VerifierOptions())) as running:
        monkeypatch.setattr("fides_plugins.enclave.protocol.infer", fail)
        tensor = np.zeros((1, *IMAGE_28), np.float32)
        data, headers = body("x", tensor)
        connection = http.client.HTTPConnection(*running.http.split(":"), timeout=20)  # type: ignore[arg-type]
        connection.request("POST", "/v2/models/digits/infer", body=data, headers=headers)
        reply = connection.getresponse()
        assert (reply.status, json.loads(reply.read())["error"]) == (500, "The verifier cannot answer.")
        monkeypatch.setattr("fides_plugins.enclave.protocol.model_metadata", fail)
        connection.request("GET", "/v2/models/digits")
        reply = connection.getresponse()
        assert (reply.status, json.loads(reply.read())["error"]) == (500, "The verifier cannot answer.")
        connection.close()
    assert caplog.text.count("secret of the inside") >= 2


def test_shapes_that_no_array_can_have_are_the_peers_fault(server: Process) -> None:
    huge = [2**31 - 1, 2**31 - 1, 0]
    entry = {"name": "image", "shape": huge, "datatype": "FP32", "parameters": {"binary_data_size": 0}}
    text = json.dumps({"inputs": [entry]}).encode()
    connection = http.client.HTTPConnection(*server.http.split(":"), timeout=20)  # type: ignore[arg-type]
    headers = {"Inference-Header-Content-Length": str(len(text))}
    connection.request("POST", "/v2/models/digits/infer", body=text, headers=headers)
    reply = connection.getresponse()
    assert (reply.status, json.loads(reply.read())["code"]) == (400, "request-input")
    connection.close()
