"""What a killed step does to four clients, under four designs. Figures of docs/explanation/triton-failure.md.

    python benchmarks/triton_failure.py

For each design: latency while all is well, then the process of `fides_verify` is killed and four clients
go on for some seconds. Counted: answers with a verdict, answers marked `error`, failed requests, the
slowest one, and when the last request without a verdict ended.
"""

from __future__ import annotations

import argparse
import os
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

from fides_plugins.launch.triton import TritonServer
from fides_plugins.serving.triton.attach import attach
from fides_plugins.serving.triton.config import parse_text
from fides_plugins.serving.triton.operator.api import InferenceRefused, TritonApi
from fides_plugins.serving.triton.operator.watch import Watcher, watch_forever
from fides_plugins.serving.triton.plan import AttachOptions
from fides_plugins.testing import INPUT_NAME, fake_logits, linear_onnx, make_bundle

N_CLIENTS = 4
DESIGNS = ("ensemble", "two instances", "bls", "watch", "two instances + watch")
SERVICE = "from fides_plugins.serving.triton.onnx_service import TritonPythonModel as TritonPythonModel\n"
CONFIG = f"""backend: "python"
max_batch_size: 16
input [ {{ name: "{INPUT_NAME}" data_type: TYPE_FP32 dims: [ 10 ] }} ]
output [ {{ name: "scores" data_type: TYPE_FP32 dims: [ 10 ] }} ]
instance_group [ {{ kind: KIND_CPU count: 1 }} ]
"""

#: A prototype of the alternative: one python model that calls the others, with a breaker around verification.
BLS = f'''
import asyncio, time
import numpy as np
import triton_python_backend_utils as pb_utils

BETWEEN = ["FIDES_REFERENCES", "FIDES_AVAILABLE", "FIDES_VERIFICATION"]
VERDICT = ["scores", "FIDES_STATUS"]


def ask(model, tensors, outputs):
    return pb_utils.InferenceRequest(model_name=model, inputs=tensors, requested_output_names=outputs).async_exec()


class TritonPythonModel:
    def initialize(self, args):
        self.open_until = 0.0

    async def one(self, request):
        given = [pb_utils.Tensor("{INPUT_NAME}", pb_utils.get_input_tensor_by_name(request, "{INPUT_NAME}").as_numpy())]
        service = asyncio.ensure_future(ask("m", given, ["scores"]))
        verified = None
        if time.monotonic() > self.open_until:
            try:
                verified = await asyncio.wait_for(asyncio.ensure_future(ask("m__fides_verify", given, BETWEEN)), 0.5)
            except asyncio.TimeoutError:
                self.open_until = time.monotonic() + 1.0
        service = await service
        if verified is None or verified.has_error():
            if verified is not None:
                self.open_until = time.monotonic() + 1.0
            scores = service.output_tensors()[0].as_numpy()
            status = np.array([["error"]] * len(scores), dtype=np.object_)
            tensors = [pb_utils.Tensor("scores", scores), pb_utils.Tensor("FIDES_STATUS", status)]
            return pb_utils.InferenceResponse(tensors)
        found = service.output_tensors() + verified.output_tensors()
        tensors = [pb_utils.Tensor(t.name(), t.as_numpy()) for t in found]
        verdict = await ask("m__fides_validate", tensors, VERDICT)
        if verdict.has_error():
            return pb_utils.InferenceResponse(output_tensors=[], error=verdict.error())
        return pb_utils.InferenceResponse([pb_utils.Tensor(t.name(), t.as_numpy()) for t in verdict.output_tensors()])

    async def execute(self, requests):
        return list(await asyncio.gather(*[self.one(r) for r in requests]))
'''


def build(root: Path) -> Path:
    """A small service, protected as `m` by attach, and the prototype `bls` over the same steps."""
    repository = root / "repository"
    for name, code in (("m", SERVICE), ("bls", BLS)):
        (repository / name / "1").mkdir(parents=True)
        (repository / name / "1" / "model.py").write_text(code)
        (repository / name / "config.pbtxt").write_text(CONFIG)
    (repository / "m" / "1" / "model.onnx").write_bytes(linear_onnx(np.eye(10, dtype=np.float32), output_name="scores"))
    status = '{ name: "FIDES_STATUS" data_type: TYPE_STRING dims: [ 1 ] }'
    text = CONFIG.replace("output [ {", f"output [ {status}, {{") + "dynamic_batching { }\n"
    (repository / "bls" / "config.pbtxt").write_text(text)
    make_bundle(root / "bundle")
    attach(repository, "m", AttachOptions(root / "bundle", serve_as="p", settings={"mode": "flag"}))
    for part in ("verify", "validate"):
        (repository / f"m__fides_{part}").symlink_to(f"p__fides_{part}")
    return repository


def ask(api: TritonApi, model: str) -> str:
    """One request; the status of its row."""
    found = api.infer(model, {INPUT_NAME: fake_logits(1)}, ["scores", "FIDES_STATUS"])
    return str(found["FIDES_STATUS"][0, 0].decode())


def load(one: Callable[[], str], seconds: float, clients: int) -> list[tuple[float, float, str]]:
    """(start, end, answer) of every request of a closed loop."""
    log: list[tuple[float, float, str]] = []
    end = time.monotonic() + seconds

    def client() -> None:
        while time.monotonic() < end:
            start = time.monotonic()
            try:
                answer = one()
            except InferenceRefused as error:
                answer = f"failed {error.status}"
            except OSError as error:
                answer = f"lost {type(error).__name__}"
            log.append((start, time.monotonic(), answer))

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return log


def run(design: str, root: Path, seconds: float) -> str:
    """Measure one design; a line for the table."""
    repository = build(root)
    model, step = ("bls", "m__fides_verify") if design == "bls" else ("p__fides", "p__fides_verify")
    if design.startswith("two instances"):
        file = repository / step / "config.pbtxt"
        file.write_text(file.read_text().replace("count: 1", "count: 2"))
        assert parse_text(file.read_text(), step).instance_group[0].count == 2
    names = ["m", model, *(["m__fides_verify", "m__fides_validate"] if design == "bls" else ["p"])]
    with TritonServer(
        repository, explicit=True, load=[*names, *(["p__fides_fallback"] if design.endswith("watch") else [])],
        auto_complete=False, grace_s=1.0,
    ) as server:  # fmt: skip
        stop = threading.Event()
        events: list[tuple[float, str]] = []
        if design.endswith("watch"):
            watcher = Watcher(
                TritonApi(server.http_address), report=lambda e: events.append((time.monotonic(), e.kind))
            )
            threading.Thread(target=watch_forever, args=(watcher, 0.2, stop), daemon=True).start()
            while sum(kind == "settled" for _, kind in events) < 3:
                time.sleep(0.1)
        api = server.api
        load(lambda: ask(api, model), 1.0, N_CLIENTS)
        quiet = {n: load(lambda: ask(api, model), 2.0, n) for n in (1, N_CLIENTS)}
        killer = threading.Timer(1.0, lambda: os.kill(server.stub_pids(step)[0], signal.SIGKILL))
        begin = time.monotonic()
        killer.start()
        log = load(lambda: ask(api, model), seconds + 1.0, N_CLIENTS)
        stop.set()
    killed = begin + 1.0
    seen = [entry for entry in log if entry[1] > killed]
    kinds = Counter(answer.split()[0] for *_, answer in seen)
    unjudged = [end for _, end, answer in seen if answer != "trusted"]
    still = sum(answer != "trusted" for start, _, answer in seen if start > begin + seconds)
    p50 = {n: 1e3 * float(np.median([end - start for start, end, _ in q])) for n, q in quiet.items()}
    rate = len(quiet[N_CLIENTS]) / 2.0
    last = "never" if still else f"{max(unjudged, default=killed) - killed:.1f} s"
    slowest = max(end - start for start, end, _ in seen)
    return (
        f"{design:21} {p50[1]:8.2f} {p50[N_CLIENTS]:8.2f} {rate:7.0f} {kinds['trusted']:9d} {kinds['error']:7d} "
        f"{kinds['failed'] + kinds['lost']:7d} {slowest:9.2f} {last:>10}"
    )


def main() -> None:
    """Measure every design."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=6.0, help="time after the kill")
    parser.add_argument(
        "--designs", nargs="+", default=["ensemble", "two instances", "bls", "watch", "two instances + watch"]
    )
    arguments = parser.parse_args()
    print("design                 p50 ms 1  p50 ms 4  req/s   trusted  marked  failed  slowest s  all judged")
    for design in arguments.designs:
        with tempfile.TemporaryDirectory() as folder:
            print(run(design, Path(folder), arguments.seconds), flush=True)


if __name__ == "__main__":
    main()
