"""Distillation on two real workers: the same student as one worker's, and a killed worker costs an epoch.

The first test trains directly, so that it can compare; the others run `fides fit` as a person would.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fides_plugins.bundle import Bundle
from fides_plugins.launch.process import command_line, descendants, stop_tree

pytest.importorskip("torch")
# Starting Ray takes minutes where other work keeps the machine busy.
pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(900)]

EPOCHS = 10
N_HELD_OUT = 2000

#: A worker: distils a linear teacher of 20 features into a small network and says how often both agree.
SCRIPT = textwrap.dedent(
    f"""
    import json, os, sys, time
    from pathlib import Path
    import numpy as np, torch
    from fides_plugins.training.distil.distillation import (
        DistillationSettings, TransferSet, agreement, distil, predict)
    from fides_plugins.training.distil.distributed import member, run_ray

    folder, pause, engine = Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3]

    def run(who):
        torch.set_num_threads(1)
        rng = np.random.default_rng(0)
        weight = rng.normal(size=(20, 5)).astype(np.float32)
        def rows(n):
            images = rng.normal(size=(n, 20)).astype(np.float32)
            return images, np.asarray(images @ weight, np.float32)
        images, logits = rows(4000)
        held_out, wanted = rows({N_HELD_OUT})
        transfer = TransferSet(images, logits, np.full(len(images), -1, np.int64))
        torch.manual_seed(0)
        module = torch.nn.Sequential(torch.nn.Linear(20, 32), torch.nn.ReLU(), torch.nn.Linear(32, 5))
        def on_epoch(done):
            with (folder / f"epochs-{{who.rank}}").open("a") as log:
                log.write(f"{{round(done * {EPOCHS})}} {{os.getpid()}}\\n")
            time.sleep(pause)
        settings = DistillationSettings(epochs={EPOCHS}, batch_size=100)
        distil(module, torch.from_numpy(images), transfer, settings, 1e-2, {EPOCHS}, 0, on_epoch, who)
        result = {{"agreement": agreement(predict(module, held_out), wanted), "world": who.world}}
        result["weights"] = [p.sum().item() for p in module.parameters()]
        (folder / f"result-{{who.rank}}.json").write_text(json.dumps(result))
        return result

    if engine == "ray":
        print(run_ray(run, 2, folder / "checkpoints"))
    else:
        with member(folder / "checkpoints") as who:
            run(who)
    """
)


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}


def train(folder: Path, workers: int, pause: float = 0.0, engine: str = "torchrun") -> subprocess.Popen[bytes]:
    folder.mkdir()
    script = folder / "train.py"
    script.write_text(SCRIPT)
    command = [sys.executable]
    if engine == "torchrun":
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={workers}", "--max-restarts=3"]
    command += [str(script), str(folder), str(pause), engine]
    with (folder / "log").open("wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment())


def finish(process: subprocess.Popen[bytes], folder: Path) -> list[dict[str, Any]]:
    try:
        assert process.wait(timeout=500) == 0, (folder / "log").read_text()[-3000:]
    finally:
        stop_tree(process.pid)
    return [json.loads(p.read_text()) for p in sorted(folder.glob("result-*.json"))]


def epochs(folder: Path, rank: int = 0) -> list[tuple[int, int]]:
    """(epoch, process id) of every epoch that a worker finished, in order."""
    path = folder / f"epochs-{rank}"
    lines = path.read_text().splitlines() if path.exists() else []
    return [(int(e), int(p)) for e, p in (line.split() for line in lines)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("alone") / "run"
    (result,) = finish(train(folder, 1), folder)
    return result


def interval(share: float) -> float:
    """Half of the 95 % interval of a share of the held-out rows."""
    return 1.96 * float(np.sqrt(share * (1 - share) / N_HELD_OUT))


@pytest.mark.parametrize("engine", ["torchrun", "ray"])
def test_two_workers_reach_the_agreement_of_one(tmp_path: Path, alone: dict[str, Any], engine: str) -> None:
    if engine == "ray":
        pytest.importorskip("ray.train", reason="ray is not installed")
    results = finish(train(tmp_path / "run", 2, engine=engine), tmp_path / "run")
    assert [r["world"] for r in results] == [2, 2]
    assert results[0] == results[1]
    assert alone["agreement"] > 0.9
    print(f"{engine}: agreement of one worker {alone['agreement']:.4f}, two {results[0]['agreement']:.4f}")
    assert abs(results[0]["agreement"] - alone["agreement"]) <= interval(alone["agreement"])
    # Without batch norm and dropout the batches and their gradients are the same, up to rounding.
    np.testing.assert_allclose(results[0]["weights"], alone["weights"], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_worker_costs_no_more_than_since_the_last_checkpoint(
    tmp_path: Path, alone: dict[str, Any], victim: int
) -> None:
    folder = tmp_path / "run"
    process = train(folder, 2, pause=0.4)
    deadline = time.monotonic() + 100
    while len(epochs(folder, victim)) < 4:
        assert process.poll() is None, (folder / "log").read_text()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    done, pid = epochs(folder, victim)[-1]
    os.kill(pid, signal.SIGKILL)
    results = finish(process, folder)
    for rank in (0, 1):
        log = epochs(folder, rank)
        pids = [p for _, p in log]
        first, again = [e for e, p in log if p == pids[0]], [e for e, p in log if p == pids[-1]]
        assert len(set(pids)) == 2
        assert again[-1] == EPOCHS
        # Every epoch that was finished before the kill is kept; the one under way may have to be done again.
        assert done <= again[0] <= done + 2
        assert len(first) + len(again) <= EPOCHS + 1
    assert results[0] == results[1]
    assert abs(results[0]["agreement"] - alone["agreement"]) <= interval(alone["agreement"])


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A linear service of 20 features, and rows for it."""
    from fides_plugins.testing import linear_onnx

    folder = tmp_path_factory.mktemp("service")
    rng = np.random.default_rng(1)
    weight = rng.normal(size=(20, 4)).astype(np.float32)
    (folder / "service.onnx").write_bytes(linear_onnx(weight))
    np.savez(folder / "data.npz", images=rng.normal(size=(1600, 20)).astype(np.float32))
    return folder


def test_fides_fit_on_two_workers(tmp_path: Path, service: Path) -> None:
    command = [sys.executable, "-m", "fides_plugins.cli", "fit", "--service", str(service / "service.onnx")]
    command += ["--data", str(service / "data.npz"), "--out", str(tmp_path / "bundle"), "--engine", "torchrun"]
    command += ["--epochs", "3", "--transfer-rows", "3000", "--max-cost", "50", "--max-size", "50", "--json"]
    command += ["--checkpoints", str(tmp_path / "checkpoints"), "--workers", "2", "--agreement", "0.5"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout[done.stdout.index("{") :])
    assert report["agreement"] > 0.5
    assert Bundle.load(tmp_path / "bundle").digest == report["digest"]
    assert list((tmp_path / "checkpoints").glob("distillation-*.safetensors"))


def test_no_process_is_left_behind() -> None:
    left = []
    for pid in descendants(os.getpid()):
        command = " ".join(command_line(pid))
        if "torch.distributed.run" in command or "fides_plugins.cli fit" in command:
            left.append(command)
    assert left == []
