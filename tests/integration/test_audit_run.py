"""`fides audit run` in processes of its own: bounded memory, a kill in the middle, Ray with two workers.

The million rows of the claim are `benchmarks/audit_run.py` (`make study`); these are 50,000.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from fides_plugins.testing import make_bundle
from tests.support.recordings import PAIRS, recorded, write_jsonl, write_parquet

pytestmark = [pytest.mark.integration, pytest.mark.slow]

ROWS = 50_000
#: Small parts, so that there is something to resume and to share.
PART_ROWS = 4000
LIMIT_MB = 300

#: Says what it did line by line; the memory is what the rows take, after all modules are there.
AUDIT = """
import json, os, sys
import onnxruntime, pyarrow.parquet
import fides_plugins.batch.ray_engine
from fides_plugins.batch.run import audit_run
from fides_plugins.launch.process import resident_bytes

bundle, source, target, engine, part_rows = sys.argv[1:]
sizes, rows = [], 0

def on_start(total, done):
    sizes.append(resident_bytes([os.getpid()]))

def on_rows(n):
    global rows
    rows += n
    sizes.append(resident_bytes([os.getpid()]))
    print(json.dumps({"rows": rows}), flush=True)

done = audit_run(
    bundle, source, target, engine=engine, workers=2, part_rows=int(part_rows), on_start=on_start, on_rows=on_rows
)
print(json.dumps({"summary": done, "growth_mb": (max(sizes) - sizes[0]) / 1e6}), flush=True)
"""


def audit(folder: Path, source: str, target: str, engine: str = "local", kill_at: int = 0) -> dict[str, Any]:
    """One run in a process of its own; with `kill_at`, killed with SIGKILL after that many rows."""
    command = [sys.executable, "-c", AUDIT, folder / "bundle", folder / source, folder / target, engine, str(PART_ROWS)]
    said: dict[str, Any] = {}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("{"):
                said.update(json.loads(line))
            if kill_at and said.get("rows", 0) >= kill_at:
                process.kill()
                break
    assert kill_at or process.returncode == 0
    return said


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("audit")
    make_bundle(made / "bundle")
    columns = recorded(ROWS, share=0.02)
    write_parquet(made / "in.parquet", columns, *PAIRS)
    write_jsonl(made / "in.jsonl", {name: columns[name][:5000] for name in PAIRS}, *PAIRS)
    return made


@pytest.fixture(scope="module")
def local(folder: Path) -> dict[str, Any]:
    return audit(folder, "in.parquet", "local.parquet")


def test_every_row_is_judged_in_bounded_memory(folder: Path, local: dict[str, Any]) -> None:
    table = pq.read_table(folder / "local.parquet")
    np.testing.assert_array_equal(table["row"].to_numpy(), np.arange(ROWS))
    assert table["request_id"].to_pylist() == [f"request-{i}" for i in range(ROWS)]
    assert 0.02 < local["summary"]["attacked_share"] < 0.04
    assert local["growth_mb"] < LIMIT_MB
    print(f"{local['summary']['rows_per_second']:,.0f} rows/s, {local['growth_mb']:.0f} MB more than at the start")


def test_killed_half_way_and_resumed_gives_the_same_file(folder: Path, local: dict[str, Any]) -> None:
    target = folder / "resumed.parquet"
    killed = audit(folder, "in.parquet", target.name, kill_at=ROWS // 2)
    assert killed["rows"] < ROWS
    assert not target.exists()
    resumed = audit(folder, "in.parquet", target.name)
    # What was judged in finished parts is kept.
    assert ROWS // 2 - PART_ROWS <= resumed["summary"]["resumed_rows"] < ROWS
    assert target.read_bytes() == (folder / "local.parquet").read_bytes()


def test_json_lines_give_the_same_statuses(folder: Path, local: dict[str, Any]) -> None:
    audit(folder, "in.jsonl", "jsonl.parquet")
    found = pq.read_table(folder / "jsonl.parquet")["status"].to_pylist()
    assert found == pq.read_table(folder / "local.parquet")["status"].to_pylist()[:5000]


def test_two_ray_workers_give_the_same_file(folder: Path, local: dict[str, Any]) -> None:
    pytest.importorskip("ray", reason="ray is not installed")
    result = audit(folder, "in.parquet", "ray.parquet", "ray")
    assert result["rows"] == ROWS
    assert (folder / "ray.parquet").read_bytes() == (folder / "local.parquet").read_bytes()
