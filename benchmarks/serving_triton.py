"""What validation costs in Triton: bare model, one-step ensemble, protected model, side by side in one run.

    python benchmarks/serving_triton.py --json triton.json

Two inputs: a small one (64 floats) and an image (3x224x224). The service costs about ten times the
verification model. Every cell is measured in several short rounds that take turns, because the speed of
a shared machine drifts: compare the ratios in one row, not milliseconds of different runs. CPU seconds
and resident memory are those of the server and all its processes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc
import tritonclient.http
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from fides_plugins.bundle import InputSpec, Manifest, VerificationSpec, write_bundle
from fides_plugins.cli._output import progress
from fides_plugins.launch.process import cpu_seconds, resident_bytes
from fides_plugins.launch.triton import TritonServer
from fides_plugins.onnx_model import OnnxModel
from fides_plugins.serving.triton.attach import attach
from fides_plugins.serving.triton.plan import AttachOptions
from fides_plugins.testing import make_bundle

N_CLASSES = 10
SHAPES = {"small": (64,), "image": (3, 224, 224)}
SERVICE = "from fides_plugins.serving.triton.onnx_service import TritonPythonModel as TritonPythonModel\n"


@dataclass(frozen=True)
class Cell:
    """One measured combination; times in milliseconds."""

    input: str
    protocol: str
    concurrency: int
    variant: str
    requests: int
    p50_ms: float
    p99_ms: float
    per_second: float
    cpu_ms_per_request: float
    p50_ratio: float = 1.0
    p99_ratio: float = 1.0
    throughput_ratio: float = 1.0
    cpu_ratio: float = 1.0


def _model(nodes: list[Any], shape: tuple[int, ...], constants: list[Any]) -> bytes:
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", *shape])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["N", N_CLASSES])],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return bytes(model.SerializeToString())


def mlp(width: int, depth: int) -> bytes:
    """A perceptron over 64 floats."""
    rng = np.random.default_rng(width)
    sizes = [64, *[width] * depth, N_CLASSES]
    nodes, constants, last = [], [], "x"
    for index, (a, b) in enumerate(itertools.pairwise(sizes)):
        weight = rng.normal(0, 1 / np.sqrt(a), (a, b)).astype(np.float32)
        constants.append(numpy_helper.from_array(weight, f"w{index}"))
        out = "scores" if index == len(sizes) - 2 else f"h{index}"
        nodes.append(helper.make_node("MatMul", [last, f"w{index}"], [out if out == "scores" else f"m{index}"]))
        if out != "scores":
            nodes.append(helper.make_node("Relu", [f"m{index}"], [out]))
        last = out
    return _model(nodes, SHAPES["small"], constants)


def cnn(channels: int, depth: int) -> bytes:
    """A convolutional net over 3x224x224."""
    rng = np.random.default_rng(channels)
    nodes, constants, last, width = [], [], "x", 3
    for index in range(depth):
        kernel, stride = (7, 4) if index == 0 else (3, 1)
        weight = rng.normal(0, 1 / np.sqrt(width * kernel**2), (channels, width, kernel, kernel)).astype(np.float32)
        constants.append(numpy_helper.from_array(weight, f"k{index}"))
        pads = [kernel // 2] * 4
        nodes.append(helper.make_node("Conv", [last, f"k{index}"], [f"c{index}"], strides=[stride] * 2, pads=pads))
        nodes.append(helper.make_node("Relu", [f"c{index}"], [f"r{index}"]))
        last, width = f"r{index}", channels
    constants.append(numpy_helper.from_array(rng.normal(0, 1, (channels, N_CLASSES)).astype(np.float32), "head"))
    nodes += [
        helper.make_node("GlobalAveragePool", [last], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"], axis=1),
        helper.make_node("MatMul", ["flat", "head"], ["scores"]),
    ]
    return _model(nodes, SHAPES["image"], constants)


def seconds_in_process(data: bytes, array: NDArray[Any]) -> float:
    """Shortest time of one row, with one thread: other work on the machine can only add."""
    model = OnnxModel(data)
    times = []
    for _ in range(30):
        start = time.perf_counter()
        model.run({"x": array})
        times.append(time.perf_counter() - start)
    return float(min(times))


def build(root: Path, kind: str) -> tuple[NDArray[Any], float, float]:
    """Add the service `kind` and protect it; returns a sample row, and seconds of service and verification."""
    array = np.random.default_rng(0).normal(0, 1, (1, *SHAPES[kind])).astype(np.float32)
    verification = mlp(256, 2) if kind == "small" else cnn(8, 1)
    target = 10 * seconds_in_process(verification, array)
    service = b""
    for depth in range(2, 60):
        service = mlp(768, depth) if kind == "small" else cnn(12, depth)
        if seconds_in_process(service, array) >= target:
            break
    folder = root / "repository" / kind / "1"
    folder.mkdir(parents=True)
    (folder / "model.onnx").write_bytes(service)
    (folder / "model.py").write_text(SERVICE)
    dims = ", ".join(map(str, SHAPES[kind]))
    tensors = f'input [ {{ name: "x" data_type: TYPE_FP32 dims: [ {dims} ] }} ]\n'
    tensors += f'output [ {{ name: "scores" data_type: TYPE_FP32 dims: [ {N_CLASSES} ] }} ]\n'
    rest = "instance_group [ { kind: KIND_CPU count: 1 } ]\n"
    (folder.parent / "config.pbtxt").write_text(f'backend: "python"\nmax_batch_size: 16\n{tensors}{rest}')
    fake = make_bundle(root / f"fake-{kind}", n_classes=N_CLASSES)
    files = {name: fake.file(name) for name in fake.file_names} | {"verification.onnx": verification}
    manifest = fake.manifest.model_copy(
        update={
            "input": InputSpec(name="x", dtype="float32", shape=(None, *SHAPES[kind])),
            "verification": VerificationSpec(input_name="x", output_name="scores"),
            "files": {},
        }
    )
    write_bundle(root / f"bundle-{kind}", Manifest.model_validate(manifest.model_dump()), files)
    attach(root / "repository", kind, AttachOptions(root / f"bundle-{kind}"))
    one = root / "repository" / f"{kind}_one"
    (one / "1").mkdir(parents=True)
    step = f'model_name: "{kind}__base" model_version: 1 input_map {{ key: "x" value: "x" }} '
    step += 'output_map { key: "scores" value: "scores" }'
    ensemble = f"ensemble_scheduling {{ step [ {{ {step} }} ] }}\n"
    (one / "config.pbtxt").write_text(f'platform: "ensemble"\nmax_batch_size: 16\n{tensors}{ensemble}')
    return array, seconds_in_process(service, array), target / 10


def drive(
    server: TritonServer, protocol: str, model: str, array: NDArray[Any], concurrency: int, seconds: float
) -> tuple[list[float], float]:
    """Latencies of a closed loop of `concurrency` clients, and the wall time."""
    module = tritonclient.http if protocol == "http" else tritonclient.grpc
    address = server.http_address if protocol == "http" else server.grpc_address
    latencies: list[float] = []
    start_line = threading.Barrier(concurrency + 1)
    deadline = [0.0]

    def client() -> None:
        with module.InferenceServerClient(address) as connection:
            tensor = module.InferInput("x", list(array.shape), "FP32")
            tensor.set_data_from_numpy(array)
            connection.infer(model, [tensor])
            mine = []
            start_line.wait()
            while (start := time.perf_counter()) < deadline[0]:
                connection.infer(model, [tensor])
                mine.append(time.perf_counter() - start)
            latencies.extend(mine)

    threads = [threading.Thread(target=client) for _ in range(concurrency)]
    for thread in threads:
        thread.start()
    begin = time.perf_counter()
    deadline[0] = begin + seconds
    start_line.wait()
    for thread in threads:
        thread.join()
    return latencies, time.perf_counter() - begin


def variants(kind: str) -> dict[str, str]:
    """Name in the table to name of the model."""
    return {
        "bare": f"{kind}__base",
        "one-step ensemble": f"{kind}_one",
        "protected": kind,
        "protected + verdict": f"{kind}__fides",
    }


def measure(
    server: TritonServer, kind: str, array: NDArray[Any], arguments: argparse.Namespace, step: Any
) -> Iterator[Cell]:
    """All cells of one input; the variants take turns within a cell."""
    for protocol in ("http", "grpc"):
        for concurrency in arguments.concurrency:
            found: dict[str, tuple[list[float], float, float]] = {}
            for _ in range(arguments.rounds):
                for variant, model in variants(kind).items():
                    before = cpu_seconds(server.process.tree)
                    latencies, wall = drive(server, protocol, model, array, concurrency, arguments.seconds)
                    cpu = cpu_seconds(server.process.tree) - before
                    old = found.get(variant, ([], 0.0, 0.0))
                    found[variant] = (old[0] + latencies, old[1] + wall, old[2] + cpu)
                    step()
            bare: Cell | None = None
            for variant, (latencies, wall, cpu) in found.items():
                n = len(latencies)
                p50, p99 = (1e3 * float(v) for v in np.percentile(latencies, [50, 99]))
                cell = Cell(kind, protocol, concurrency, variant, n, p50, p99, n / wall, 1e3 * cpu / n)
                bare = bare or cell
                yield Cell(
                    **{
                        **asdict(cell),
                        "p50_ratio": cell.p50_ms / bare.p50_ms,
                        "p99_ratio": cell.p99_ms / bare.p99_ms,
                        "throughput_ratio": cell.per_second / bare.per_second,
                        "cpu_ratio": cell.cpu_ms_per_request / bare.cpu_ms_per_request,
                    }
                )


def main() -> None:
    """Run the benchmark; print a table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1.0, help="length of one round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--inputs", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--json", type=Path, help="write all numbers here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        built = {kind: build(root, kind) for kind in arguments.inputs}
        with TritonServer(root / "repository", config_name="fides", auto_complete=False) as server:
            bases = [p for kind in built for p in server.stub_pids(f"{kind}__base")]
            steps = [p for p in server.process.tree[1:] if p not in bases]
            cells: list[Cell] = []
            total = len(built) * 2 * len(arguments.concurrency) * arguments.rounds * 4
            with progress() as bar:
                task = bar.add_task("measuring", total=total)
                for kind, (array, _, _) in built.items():
                    cells += measure(server, kind, array, arguments, lambda: bar.advance(task))
            memory = {
                "server": resident_bytes([server.process.pid]),
                "services": resident_bytes(bases),
                "fides steps": resident_bytes(steps),
                "processes of fides": len(steps),
            }
    costs = {k: {"service_ms": 1e3 * s, "verification_ms": 1e3 * v} for k, (_, s, v) in built.items()}
    report(cells, memory, costs)
    if arguments.json:
        result = {"cpus": os.cpu_count(), "memory_bytes": memory, "costs": costs, "cells": [asdict(c) for c in cells]}
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


def report(cells: list[Cell], memory: dict[str, int], costs: dict[str, dict[str, float]]) -> None:
    """Print the table, plain text of one line per cell; `x` columns are ratios to the bare model."""
    print("input protocol clients variant             p50 ms   p99 ms   req/s  CPU ms  p50 x  p99 x  req/s x  CPU x")
    for c in cells:
        print(
            f"{c.input:5} {c.protocol:8} {c.concurrency:7} {c.variant:19}"
            f"{c.p50_ms:8.2f} {c.p99_ms:8.2f} {c.per_second:7.0f} {c.cpu_ms_per_request:7.2f}"
            f"{c.p50_ratio:7.2f}{c.p99_ratio:7.2f}{c.throughput_ratio:9.2f}{c.cpu_ratio:7.2f}"
        )
    for kind, cost in costs.items():
        service, verification = cost["service_ms"], cost["verification_ms"]
        print(f"{kind}: service {service:.2f} ms, verification {verification:.2f} ms ({service / verification:.1f}x)")
    megabytes = {k: v / 1e6 for k, v in memory.items() if k != "processes of fides"}
    print(", ".join(f"{k} {v:.0f} MB resident" for k, v in megabytes.items()))


if __name__ == "__main__":
    main()
