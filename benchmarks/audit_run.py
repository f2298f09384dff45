"""One million recorded rows through `fides audit run`: rows per second, resident growth, Ray, and a kill.

    python benchmarks/audit_run.py                    # 1,000,000 rows of 10 classes
    python benchmarks/audit_run.py --rows 100000 --classes 100

Four runs over the same generated recording, in processes of their own: one machine; the same killed
half way and resumed; JSON Lines of a tenth of the rows; Ray Data with two workers. Prints a table, and
with `--json FILE` writes the numbers. Exits with 1 if an output differs or memory grows past 300 MB.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fides_plugins.launch.process import command_line, descendants, resident_bytes
from fides_plugins.testing import fake_logits, fake_service, make_bundle, switch_top_two
from fides_plugins.types import softmax

LIMIT_MB = 300
BLOCK = 100_000

#: Runs the audit in a process whose memory before the first row is known.
WORKER = """
import json, sys, time
import psutil
from fides_plugins.batch.run import audit_run
import fides_plugins.batch.ray_engine, onnxruntime, pyarrow.parquet
bundle, source, target, engine = sys.argv[1:]
def rss():
    return psutil.Process().memory_info().rss
base = peak = 0
def on_start(total, done):
    global base, peak
    base = peak = rss()
    print(json.dumps({"base": base}), flush=True)
rows = 0
def on_rows(n):
    global rows, peak
    rows += n
    peak = max(peak, rss())
    print(json.dumps({"rows": rows}), flush=True)
summary = audit_run(bundle, source, target, engine=engine, workers=2, on_start=on_start, on_rows=on_rows)
peak = max(peak, rss())
print(json.dumps({"summary": summary, "growth_mb": (peak - base) / 1e6}), flush=True)
"""


def generate(path: Path, n_rows: int, n_classes: int) -> None:
    """A recording with 2 % attacked rows, written block by block."""
    writer: pq.ParquetWriter | None = None
    for start in range(0, n_rows, BLOCK):
        n = min(BLOCK, n_rows - start)
        logits = fake_logits(n, n_classes, seed=start)
        service = fake_service(logits, seed=start + 1).probabilities
        attacked = np.flatnonzero(np.random.default_rng(start + 2).random(n) < 0.02)
        service = switch_top_two(service, attacked)
        columns = {
            "request_id": pa.array([f"r{i}" for i in range(start, start + n)]),
            "service_probabilities": _lists(service),
            "verification_probabilities": _lists(softmax(logits)),
        }
        table = pa.table(columns)
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table)
    if writer is not None:
        writer.close()


def _lists(matrix: Any) -> pa.Array:
    offsets = np.arange(0, matrix.size + 1, matrix.shape[1], dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.ascontiguousarray(matrix).ravel()))


def audit(folder: Path, source: Path, target: Path, engine: str = "local", kill_at: int = 0) -> dict[str, Any]:
    """One run in a process of its own; with `kill_at`, killed with SIGKILL after that many rows."""
    command = [sys.executable, "-c", WORKER, str(folder / "bundle"), str(source), str(target), engine]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    workers_peak = [0]
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.2):
            mine = [p for p in descendants(process.pid) if "RayAuditor" in " ".join(command_line(p))]
            workers_peak[0] = max([workers_peak[0], *(resident_bytes([p]) for p in mine)])

    watcher = threading.Thread(target=watch, daemon=True)
    if engine == "ray":
        watcher.start()
    result: dict[str, Any] = {}
    for line in process.stdout:
        if not line.startswith("{"):
            continue
        message = json.loads(line)
        result.update(message)
        if kill_at and message.get("rows", 0) >= kill_at:
            process.send_signal(signal.SIGKILL)
            break
    process.wait()
    done.set()
    if not kill_at and "summary" not in result:
        raise SystemExit("the run failed")
    if engine == "ray":
        result["worker_peak_mb"] = workers_peak[0] / 1e6
    return result


def to_jsonl(source: Path, target: Path, n_rows: int) -> None:
    """The first rows of a Parquet file as JSON Lines."""
    with pq.ParquetFile(source) as file, target.open("w") as stream:
        for batch in file.iter_batches(10_000):
            for row in batch.to_pylist()[: max(0, n_rows)]:
                stream.write(json.dumps(row) + "\n")
            n_rows -= batch.num_rows
            if n_rows <= 0:
                return


def study(folder: Path, n_rows: int, n_classes: int, with_ray: bool) -> dict[str, Any]:
    """All runs; the numbers by name of the run."""
    make_bundle(folder / "bundle", n_classes)
    source = folder / "in.parquet"
    start = time.perf_counter()
    generate(source, n_rows, n_classes)
    print(f"{n_rows:,} rows generated in {time.perf_counter() - start:.0f} s, {source.stat().st_size / 1e6:.0f} MB")
    local = folder / "local.parquet"
    results: dict[str, Any] = {"local": audit(folder, source, local)}
    killed = audit(folder, source, folder / "resumed.parquet", kill_at=n_rows // 2)
    results["killed, resumed"] = audit(folder, source, folder / "resumed.parquet")
    results["killed, resumed"]["killed_at"] = killed["rows"]
    results["killed, resumed"]["equal"] = filecmp.cmp(local, folder / "resumed.parquet", shallow=False)
    to_jsonl(source, folder / "in.jsonl", n_rows // 10)
    results["JSON Lines, a tenth"] = audit(folder, folder / "in.jsonl", folder / "jsonl.parquet")
    if with_ray:
        results["Ray, 2 workers"] = audit(folder, source, folder / "ray.parquet", "ray")
        results["Ray, 2 workers"]["equal"] = filecmp.cmp(local, folder / "ray.parquet", shallow=False)
    return results


def main() -> int:
    """Run the study; the exit status says whether the claims hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--no-ray", action="store_true")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="fides-audit-"))
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        results = study(folder, arguments.rows, arguments.classes, not arguments.no_ray)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(f"{'run':24}{'rows/s':>12}{'seconds':>10}{'growth MB':>12}  equal")
    good = True
    for name, result in results.items():
        summary = result["summary"]
        equal = result.get("equal", True)
        good &= equal and result["growth_mb"] < LIMIT_MB
        numbers = f"{summary['rows_per_second']:12,.0f}{summary['seconds']:10.1f}{result['growth_mb']:12.0f}"
        print(
            f"{name:24}{numbers}  {equal}"
            + (f"  (worker peak {result['worker_peak_mb']:.0f} MB)" if "worker_peak_mb" in result else "")
            + (f"  (killed at {result['killed_at']:,})" if "killed_at" in result else "")
        )
    if arguments.json:
        arguments.json.write_text(json.dumps({"rows": arguments.rows, "runs": results}, indent=2))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
