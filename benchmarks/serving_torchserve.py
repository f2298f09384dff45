"""Cost of the protection on a real TorchServe: the bare and the protected model side by side in one run.

The service and the verification model are compute-bound ONNX graphs, each on one thread, stretched at
start-up until one row takes `--service-ms` and `--verification-ms` on this machine. Bare and protected
requests alternate, so that both see the same noise.

    python benchmarks/serving_torchserve.py                  # the whole table, about four minutes
    python benchmarks/serving_torchserve.py --quick --check  # one line, and exit 1 if it costs too much

Prints a table; `--json FILE` writes the numbers.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from fides_plugins.bundle import InputSpec, write_bundle
from fides_plugins.launch.process import cpu_seconds, resident_bytes
from fides_plugins.launch.torchserve import TorchServeServer
from fides_plugins.launch.torchserve_grpc import GrpcClient
from fides_plugins.serving.torchserve.attach import attach
from fides_plugins.serving.torchserve.build import build_archive
from fides_plugins.testing import fake_logits, make_bundle

N_CLASSES = 10
#: Floats per request: a small input, and an image of 3 x 224 x 224.
SIZES = {"small": 64, "image": 3 * 224 * 224}
WIDTH = 512
MODELS = ("bare", "protected")
#: The bound of the issue: protected p50 <= RATIO * bare p50 + ABSOLUTE_MS, at concurrency 1.
RATIO, ABSOLUTE_MS = 1.15, 1.5

HANDLER = """
import os
import numpy as np
import onnxruntime

class Digits:
    def initialize(self, context):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        path = os.path.join(context.system_properties["model_dir"], "service.onnx")
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.initialized = True

    def preprocess(self, data):
        return np.stack([np.frombuffer(r.get("data", r.get("body")), np.float32) for r in data])

    def inference(self, x):
        return self.session.run(None, {"pixels": x})[0]

    def postprocess(self, logits):
        return [{"label": int(row.argmax()), "logits": row.tolist()} for row in logits]

    def handle(self, data, context):
        return self.postprocess(self.inference(self.preprocess(data)))
"""


def graph(width: int, repeats: int) -> bytes:
    """x (N, width) -> its first ten columns as logits, after `repeats` products of 64 x 512 x 512."""
    rng = np.random.default_rng(0)
    rotation = np.linalg.qr(rng.normal(size=(WIDTH, WIDTH)))[0].astype(np.float32)
    spread = rng.normal(0, 0.01, (16, 64 * WIDTH)).astype(np.float32)
    constants = {
        "start": np.array([0], np.int64),
        "ten": np.array([N_CLASSES], np.int64),
        "sixteen": np.array([16], np.int64),
        "axis": np.array([1], np.int64),
        "last": np.array([1, 2], np.int64),
        "shape": np.array([-1, 64, WIDTH], np.int64),
        "tiny": np.float32(1e-30),
        "spread": spread,
        "rotation": rotation,
    }
    nodes = [
        helper.make_node("Slice", ["pixels", "start", "ten", "axis"], ["plain"]),
        helper.make_node("Slice", ["pixels", "start", "sixteen", "axis"], ["part"]),
        helper.make_node("MatMul", ["part", "spread"], ["flat"]),
        helper.make_node("Reshape", ["flat", "shape"], ["h0"]),
        *(helper.make_node("MatMul", [f"h{i}", "rotation"], [f"h{i + 1}"]) for i in range(repeats)),
        helper.make_node("ReduceSum", [f"h{repeats}", "last"], ["sum"], keepdims=0),
        helper.make_node("Mul", ["sum", "tiny"], ["nothing"]),
        helper.make_node("Unsqueeze", ["nothing", "axis"], ["column"]),
        helper.make_node("Add", ["plain", "column"], ["logits"]),
    ]
    made = helper.make_graph(
        nodes,
        "stretched",
        [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["N", width])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", N_CLASSES])],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def milliseconds(data: bytes, width: int, rounds: int = 25) -> float:
    """Processor time of one row on one thread: unlike wall time it does not see the machine's other work."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    x = np.zeros((1, width), np.float32)
    times = []
    for _ in range(rounds):
        start = time.thread_time()
        session.run(None, {"pixels": x})
        times.append(time.thread_time() - start)
    return 1000 * float(np.median(times))


def stretched(width: int, target_ms: float) -> tuple[bytes, float]:
    """A graph that takes about `target_ms`, and what it takes."""
    repeats = 8
    for _ in range(4):
        took = milliseconds(graph(width, repeats), width)
        repeats = max(1, round(repeats * target_ms / took))
    data = graph(width, repeats)
    return data, milliseconds(data, width)


def archives(folder: Path, size: str, service_ms: float, verification_ms: float) -> dict[str, float]:
    """Bare and protected archive for one input size; returns the models' own times."""
    width = SIZES[size]
    service, service_took = stretched(width, service_ms)
    verification, verification_took = stretched(width, verification_ms)
    plain = make_bundle(folder / f"{size}.plain", N_CLASSES)
    files = {name: plain.file(name) for name in plain.file_names} | {"verification.onnx": verification}
    spec = InputSpec(name="pixels", dtype="float32", shape=(None, width))
    write_bundle(folder / size, plain.manifest.model_copy(update={"input": spec, "files": {}}), files)
    store = folder / "store"
    store.mkdir(exist_ok=True)
    sources = {"digits.py": HANDLER, "service.onnx": service}
    bare = build_archive(store / f"bare_{size}.mar", "digits.py", sources)
    attach(bare, folder / size, store / f"protected_{size}.mar", {"mode": "flag"})
    return {"service_ms": service_took, "verification_ms": verification_took}


def caller(server: TorchServeServer, protocol: str) -> Callable[[], Callable[[str, bytes], None]]:
    """Makes one client per thread."""

    def http() -> Callable[[str, bytes], None]:
        session = httpx.Client(timeout=120, headers={"content-type": "application/octet-stream"})

        def ask(model: str, body: bytes) -> None:
            session.post(f"{server.inference_url}/predictions/{model}", content=body).raise_for_status()

        return ask

    def grpc() -> Callable[[str, bytes], None]:
        client = GrpcClient(server.grpc_target, timeout_s=120)

        def ask(model: str, body: bytes) -> None:
            client.predict(model, {"data": body})

        return ask

    return http if protocol == "http" else grpc


def measure(
    server: TorchServeServer, size: str, protocol: str, concurrency: int, requests: int, block: int
) -> dict[str, dict[str, float]]:
    """Alternate blocks of bare and protected requests from `concurrency` closed-loop clients."""
    x = np.zeros(SIZES[size], np.float32)
    x[:N_CLASSES] = fake_logits(1, N_CLASSES)[0]
    body = x.tobytes()
    make = caller(server, protocol)
    clients = [make() for _ in range(concurrency)]
    names = {model: f"{model}_{size}" for model in MODELS}
    pids = {model: [w.pid for w in server.workers(name)] for model, name in names.items()}
    seconds: dict[str, list[float]] = {m: [] for m in MODELS}
    spent = dict.fromkeys(MODELS, 0.0)
    wall = dict.fromkeys(MODELS, 0.0)

    def one(ask: Callable[[str, bytes], None], model: str, count: int) -> list[float]:
        times = []
        for _ in range(count):
            start = time.perf_counter()
            ask(names[model], body)
            times.append(time.perf_counter() - start)
        return times

    with ThreadPoolExecutor(concurrency) as pool:
        for model in MODELS:  # warm-up: connections, thread pools, TorchServe's own just-in-time compilation
            list(pool.map(lambda ask, m=model: one(ask, m, 5), clients))
        for _ in range(max(1, requests // (block * concurrency))):
            for model in MODELS:
                cpu, start = cpu_seconds(pids[model]), time.perf_counter()
                for times in pool.map(lambda ask, m=model: one(ask, m, block), clients):
                    seconds[model] += times
                wall[model] += time.perf_counter() - start
                spent[model] += cpu_seconds(pids[model]) - cpu
    return {
        model: {
            "p50_ms": 1000 * float(np.percentile(seconds[model], 50)),
            "p99_ms": 1000 * float(np.percentile(seconds[model], 99)),
            "per_second": len(seconds[model]) / wall[model],
            "cpu_ms": 1000 * spent[model] / len(seconds[model]),
            "resident_mib": resident_bytes(pids[model]) / 2**20,
            "requests": len(seconds[model]),
        }
        for model in MODELS
    }


def show(rows: list[dict[str, Any]]) -> None:
    """The table."""
    columns = ("p50_ms", "p99_ms", "per_second", "cpu_ms", "resident_mib")
    heading = " ".join(f"{c:>13}" for c in columns)
    print(f"\n{'input':<6} {'protocol':<8} {'clients':>7}  {'model':<10} {heading}")
    for row in rows:
        where = f"{row['size']:<6} {row['protocol']:<8} {row['concurrency']:>7}"
        for model in MODELS:
            numbers = " ".join(f"{row[model][c]:>13.2f}" for c in columns)
            print(f"{where}  {model:<10} {numbers}")
        ratios = " ".join(f"{row['protected'][c] / row['bare'][c]:>12.2f}x" for c in columns)
        print(f"{'':<24} {'ratio':<10} {ratios}")


def main() -> int:
    """Run, print, and with `--check` say whether the bound holds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--service-ms", type=float, default=20.0)
    parser.add_argument("--verification-ms", type=float, default=5.0)
    parser.add_argument("--requests", type=int, default=300, help="requests per model and line")
    parser.add_argument("--quick", action="store_true", help="small input, HTTP, one client")
    parser.add_argument("--check", action="store_true", help="exit 1 if the bound does not hold")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    options = parser.parse_args()
    sizes = ["small"] if options.quick else list(SIZES)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="fides-bench-") as name:
        folder = Path(name)
        own = {size: archives(folder, size, options.service_ms, options.verification_ms) for size in sizes}
        for size, times in own.items():
            print(f"{size}: service {times['service_ms']:.1f} ms, verification {times['verification_ms']:.1f} ms")
        models = {p.stem: p.name for p in (folder / "store").glob("*.mar")}
        # One thread per model: the machine's cores are for service and verification side by side.
        with TorchServeServer(folder / "store", models, env={"OMP_NUM_THREADS": "1"}) as server:
            for size in sizes:
                for protocol in ["http"] if options.quick else ["http", "grpc"]:
                    for concurrency in [1] if options.quick else [1, 4, 16]:
                        block = 1 if concurrency == 1 else 5
                        result = measure(server, size, protocol, concurrency, options.requests, block)
                        rows.append({"size": size, "protocol": protocol, "concurrency": concurrency, **result})
                        print(f"  {size} {protocol} {concurrency}: done", file=sys.stderr)
    show(rows)
    first = rows[0]
    limit = RATIO * first["bare"]["p50_ms"] + ABSOLUTE_MS
    held = first["protected"]["p50_ms"] <= limit
    print(
        f"\nprotected p50 {first['protected']['p50_ms']:.2f} ms, bound {limit:.2f} ms "
        f"({RATIO} x bare + {ABSOLUTE_MS} ms): {'held' if held else 'NOT held'}"
    )
    if options.json:
        machine = {"python": platform.python_version(), "cores": os.cpu_count(), "load": os.getloadavg()[0]}
        document = {"machine": machine, "models": own, "rows": rows, "bound_ms": limit, "held": held}
        options.json.write_text(json.dumps(document, indent=2) + "\n")
    return 0 if held or not options.check else 1


if __name__ == "__main__":
    sys.exit(main())
