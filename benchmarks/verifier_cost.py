"""What a receipt costs, side by side in one run.

    python benchmarks/verifier_cost.py
    python benchmarks/verifier_cost.py --bundle BUNDLE --service service.onnx --json out.json

Ways of judging one row, in shuffled order so that a busy machine is busy for all of them: the verification
model in process; the verifier with a receipt (scheme "commitment"); with an encrypted reference ("hpke");
both over HTTP on the loopback; the client's own check; and running the whole service model again. Without
arguments the models are CNNs for 28 x 28 digits with random weights: costs depend on shapes, not on values.
The verifier has development evidence: evidence is checked once and kept, and no receipt depends on its kind.
Exits with 1 if the receipt itself costs more than 1 ms at the median.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import httpx
import numpy as np
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from torch import nn

from fides_plugins import oip
from fides_plugins.attestation.policy import EvidencePolicy
from fides_plugins.attestation.request import to_text
from fides_plugins.attestation.tensors import tensor_digest
from fides_plugins.attestation.verify import InsecureEvidenceWarning
from fides_plugins.attestation.wire import COMMITMENT_PARAMETER, PARAMETER, RECEIPT_OUTPUT
from fides_plugins.builtin.verify import OnnxVerifier
from fides_plugins.bundle import Bundle, InputSpec, Manifest, VerificationSpec, write_bundle
from fides_plugins.client.receipts import ReceiptChecker
from fides_plugins.client.trust import Trust
from fides_plugins.enclave.providers import DevelopmentProvider
from fides_plugins.enclave.serve import serve
from fides_plugins.enclave.verifier import Verifier, VerifierOptions
from fides_plugins.onnx_model import OnnxModel
from fides_plugins.settings import Settings
from fides_plugins.testing import memory_bundle
from fides_plugins.training.export import export_onnx
from fides_plugins.types import Query

LIMIT_MS = 1.0
SHAPE = (1, 28, 28)


def digits_cnn(width: int) -> bytes:
    """A CNN for 28 x 28 digits with random weights; of width 24 it has the size of a distilled MNIST verifier."""
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(1, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(2 * width * 14 * 14, 18),
        nn.ReLU(),
        nn.Linear(18, 10),
    ]
    return export_onnx(nn.Sequential(*layers), np.zeros((3, *SHAPE), np.float32), input_name="image")


def digits_bundle(folder: Path) -> Bundle:
    """A bundle whose verification model is that CNN."""
    fake = memory_bundle()
    files = {**{name: fake.file(name) for name in fake.file_names}, "verification.onnx": digits_cnn(24)}
    fields = {
        **dict(fake.manifest),
        "files": {},
        "input": InputSpec(name="image", dtype="float32", shape=(None, *SHAPE)),
        "verification": VerificationSpec(input_name="image"),
    }
    return write_bundle(folder, Manifest(**fields), files)


class Source:
    """The verifier's evidence without a network."""

    challenges = True

    def __init__(self, verifier: Verifier) -> None:
        self._verifier = verifier

    def fetch(self, challenge: bytes) -> Any:
        return self._verifier.evidence(challenge)


@contextmanager
def running(verifier: Verifier) -> Iterator[str]:
    """The verifier behind HTTP in a thread of this process; `host:port`."""
    ready = threading.Event()
    found: list[Any] = []

    async def main() -> None:
        stop = asyncio.Event()

        def up(port: int) -> None:
            found.extend((asyncio.get_running_loop(), stop, f"127.0.0.1:{port}"))
            ready.set()

        await serve(verifier, "127.0.0.1", 0, ready=up, stop=stop)

    thread = threading.Thread(target=lambda: asyncio.run(main()), daemon=True)
    thread.start()
    if not ready.wait(30):
        sys.exit("the verifier did not start")
    loop, stop, address = found
    yield address
    loop.call_soon_threadsafe(stop.set)
    thread.join()


def main() -> None:
    """Measure, print a table, and check the limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, help="folder of a bundle; default: a made one")
    parser.add_argument("--service", type=Path, help="ONNX file of the service model; default: a wider CNN")
    parser.add_argument("--repeats", type=int, default=400)
    parser.add_argument("--json", type=Path, help="write the numbers here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bundle = Bundle.load(options.bundle) if options.bundle else digits_bundle(Path(folder) / "bundle")
        service = OnnxModel(options.service.read_bytes() if options.service else digits_cnn(96))
        times = measure(bundle, service, options.repeats)
    report = summarize(times)
    for name, row in report["ways"].items():
        print(f"{name:<44} p50 {row['p50_ms']:7.3f} ms   p99 {row['p99_ms']:7.3f} ms   x{row['ratio']:.2f}")
    print(f"\nreceipt alone (commitment - in process)       p50 {report['receipt_ms']:7.3f} ms")
    print(f"receipt and encryption (hpke - in process)    p50 {report['sealed_receipt_ms']:7.3f} ms")
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    if max(report["receipt_ms"], report["sealed_receipt_ms"]) > LIMIT_MS:
        sys.exit(f"a receipt costs more than {LIMIT_MS} ms at the median")


def measure(bundle: Bundle, service: OnnxModel, repeats: int) -> dict[str, list[float]]:
    """Seconds of each way, one row at a time, the ways in a new order each time."""
    identity = Ed25519PrivateKey.generate()
    client = identity.public_key().public_bytes_raw()
    options = VerifierOptions(clients=frozenset((client,)), rate=1e9, burst=1e9)
    verifier = Verifier(bundle, DevelopmentProvider(), options)
    rules = {bundle.manifest.name: {"bundle_digests": [bundle.digest]}}
    policy = EvidencePolicy.model_validate({"models": rules, "clients": [client.hex()]})
    trust = Trust(policy, Source(verifier), insecure_development=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InsecureEvidenceWarning)
        trust.current()
    checkers = {s: ReceiptChecker(trust, identity, s, bundle) for s in ("commitment", "hpke")}
    plugin = OnnxVerifier()
    plugin.fides_configure(Settings(), bundle)
    spec = bundle.manifest.input
    assert spec is not None
    tensor = np.random.default_rng(0).uniform(0, 1, [d or 1 for d in spec.shape]).astype(spec.dtype)
    output = np.zeros((1, bundle.n_classes), np.float32)
    commitment = to_text(tensor_digest(output))
    times: dict[str, list[float]] = {}

    def timed(name: str, call: Callable[[], Any]) -> Any:
        begin = time.perf_counter()
        result = call()
        times.setdefault(name, []).append(time.perf_counter() - begin)
        return result

    with running(verifier) as address, httpx.Client() as web:

        def post(text: str, scheme: str) -> str:
            parameters = {PARAMETER: text, **({COMMITMENT_PARAMETER: commitment} if scheme == "commitment" else {})}
            body, headers = oip.request_body({spec.name: tensor}, parameters=parameters)
            url = f"http://{address}/v2/models/{bundle.manifest.name}/infer"
            reply = web.post(url, content=body, headers=headers).raise_for_status()
            outputs = oip.read_answer(reply.content, reply.headers.get(oip.JSON_LENGTH), (RECEIPT_OUTPUT,))
            return str(oip.first_text(outputs, RECEIPT_OUTPUT))

        def in_process() -> None:
            timed("verification model in process", lambda: plugin.fides_verify(Query({spec.name: tensor})))

        def answered(scheme: Any) -> None:
            pending = timed(f"client: request ({scheme})", lambda: checkers[scheme].begin(tensor))
            text = commitment if scheme == "commitment" else ""
            answer = timed(f"verifier with receipt ({scheme})", lambda: verifier.answer(pending.text, tensor, text))
            receipt = to_text(answer.receipt)
            timed(f"client: check ({scheme})", lambda: checkers[scheme].check(pending, receipt, output))

        def over_http(scheme: Any) -> None:
            pending = checkers[scheme].begin(tensor)
            timed(f"verifier with receipt over HTTP ({scheme})", lambda: post(pending.text, scheme))

        def again() -> None:
            timed("whole service model again", lambda: service.run({service.inputs[0].name: tensor}))

        ways = [
            in_process,
            again,
            lambda: answered("commitment"),
            lambda: answered("hpke"),
            lambda: over_http("commitment"),
            lambda: over_http("hpke"),
        ]
        rng = random.Random(0)
        for repeat in range(repeats + 20):
            if repeat == 20:
                times.clear()  # the first rounds warm caches and connections
            for way in rng.sample(ways, len(ways)):
                way()
    return times


def summarize(times: dict[str, list[float]]) -> dict[str, Any]:
    """Percentiles in milliseconds, and ratios to the verification model in process."""
    p50 = {name: 1e3 * float(np.percentile(values, 50)) for name, values in times.items()}
    base = p50["verification model in process"]
    ways = {
        name: {
            "p50_ms": p50[name],
            "p99_ms": 1e3 * float(np.percentile(times[name], 99)),
            "ratio": p50[name] / base,
        }
        for name in sorted(times, key=lambda n: p50[n])
    }
    return {
        "ways": ways,
        "receipt_ms": p50["verifier with receipt (commitment)"] - base,
        "sealed_receipt_ms": p50["verifier with receipt (hpke)"] - base,
        "repeats": len(next(iter(times.values()))),
    }


if __name__ == "__main__":
    main()
