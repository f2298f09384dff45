"""Audit logs for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fides_plugins.audit.writer import AuditOptions, LaneWriter
from fides_plugins.settings import Settings


def settings(tmp_path: Path, **options: Any) -> Settings:
    return Settings.from_mapping(
        {
            "bundle": "bundle",
            "mode": "flag",
            "service_name": "digits",
            "plugins": {
                "load": ["fides_plugins.audit:audit"],
                "options": {"audit": {"path": str(tmp_path / "log"), **options}},
            },
        }
    )


def segment(tmp_path: Path, number: int = 0, lane: int = 0) -> Path:
    return tmp_path / "log" / f"lane-{lane:02d}" / f"{number:08d}.jsonl"


def records(tmp_path: Path, lane: int = 0) -> list[dict[str, Any]]:
    files = sorted((tmp_path / "log" / f"lane-{lane:02d}").glob("*.jsonl"))
    return [json.loads(line) for f in files for line in f.read_text().splitlines()]


def small_log(folder: Path, n: int = 8, key: bytes | None = None, **options: Any) -> None:
    # Not validated: segments may be smaller here than people may make them.
    log = LaneWriter(AuditOptions(path=str(folder)).model_copy(update=options), {"service": "t"}, key)
    for i in range(n):
        assert log.put(1, lambda i=i: [{"kind": "row", "time": "t", "request_id": f"r{i}", "status": "trusted"}])
    log.close()
    assert log.line_counts["written"] == n
