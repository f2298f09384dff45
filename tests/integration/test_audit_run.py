"""`fides audit run` in processes of its own: bounded memory, a kill in the middle, Ray with two workers.

The million rows of the claim are `benchmarks/audit_run.py` (`make study`); this is the same with 50,000.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from benchmarks.audit_run import LIMIT_MB, audit, generate, same, to_jsonl
from fides_plugins.testing import make_bundle

pytestmark = [pytest.mark.integration, pytest.mark.slow]

ROWS = 50_000
#: Small parts, so that there is something to resume and to share.
PART_ROWS = 4000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("audit")
    make_bundle(made / "bundle")
    generate(made / "in.parquet", ROWS, 10)
    return made


@pytest.fixture(scope="module")
def local(folder: Path) -> dict[str, Any]:
    return audit(folder, folder / "in.parquet", folder / "local.parquet", part_rows=PART_ROWS)


def test_every_row_is_judged_in_bounded_memory(folder: Path, local: dict[str, Any]) -> None:
    table = pq.read_table(folder / "local.parquet")
    np.testing.assert_array_equal(table["row"].to_numpy(), np.arange(ROWS))
    assert table["request_id"].to_pylist() == [f"r{i}" for i in range(ROWS)]
    assert 0.02 < local["summary"]["attacked_share"] < 0.04
    assert local["growth_mb"] < LIMIT_MB
    print(f"{local['summary']['rows_per_second']:,.0f} rows/s, {local['growth_mb']:.0f} MB more than at the start")


def test_killed_half_way_and_resumed_gives_the_same_file(folder: Path, local: dict[str, Any]) -> None:
    target = folder / "resumed.parquet"
    killed = audit(folder, folder / "in.parquet", target, kill_at=ROWS // 2, part_rows=PART_ROWS)
    assert killed["rows"] < ROWS
    assert not target.exists()
    resumed = audit(folder, folder / "in.parquet", target, part_rows=PART_ROWS)
    # What was judged in finished parts is kept.
    assert ROWS // 2 - PART_ROWS <= resumed["summary"]["resumed_rows"] < ROWS
    assert same(folder / "local.parquet", target)


def test_json_lines_give_the_same_statuses(folder: Path, local: dict[str, Any]) -> None:
    to_jsonl(folder / "in.parquet", folder / "in.jsonl", 5000)
    audit(folder, folder / "in.jsonl", folder / "jsonl.parquet", part_rows=PART_ROWS)
    found = pq.read_table(folder / "jsonl.parquet")["status"].to_pylist()
    assert found == pq.read_table(folder / "local.parquet")["status"].to_pylist()[:5000]


def test_two_ray_workers_give_the_same_file(folder: Path, local: dict[str, Any]) -> None:
    pytest.importorskip("ray", reason="ray is not installed")
    result = audit(folder, folder / "in.parquet", folder / "ray.parquet", "ray", part_rows=PART_ROWS)
    assert result["rows"] == ROWS
    assert same(folder / "local.parquet", folder / "ray.parquet")
