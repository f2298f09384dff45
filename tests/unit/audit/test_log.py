"""The audit log: what it holds, and that neither disks nor kills lose more than they must."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fides_plugins.attestation.tensors import tensor_digest
from fides_plugins.audit import writer as writer_module
from fides_plugins.audit.log import AuditLog
from fides_plugins.audit.verify import verify_log
from fides_plugins.audit.writer import AuditOptions, LaneWriter
from fides_plugins.errors import SettingsError
from fides_plugins.launch.process import wait_until
from fides_plugins.pipeline import Pipeline
from fides_plugins.testing import fake_logits, fake_query, fake_service, switch_top_two
from fides_plugins.types import Prediction
from tests.support.audit_logs import records, settings, small_log


@pytest.fixture
def pipeline(tmp_path: Path, bundle_folder: Path) -> Iterator[Pipeline]:
    made = Pipeline.from_settings(settings(tmp_path), tmp_path)
    yield made
    made.close()


def test_one_line_per_row_with_digests_and_versions(tmp_path: Path, pipeline: Pipeline) -> None:
    logits = fake_logits(4)
    honest = fake_service(logits)
    lie = Prediction(switch_top_two(honest.probabilities, [2]), honest.valid)
    query = fake_query(logits, request_ids=("a", "b", "c", "d"), model_name="digits")
    verdict = pipeline.run(query, lie)
    pipeline.close()

    context, *rows = records(tmp_path)
    assert context["kind"] == "context"
    assert context["bundle"] == pipeline.bundle.digest  # type: ignore[union-attr]
    assert context["plugins"]["fides_plugins.audit:audit"] == context["plugins"]["fides-plugins"]
    assert [r["request_id"] for r in rows] == ["a", "b", "c", "d"]
    assert [r["status"] for r in rows] == ["trusted", "trusted", "attacked", "trusted"]
    for i, row in enumerate(rows):
        assert row["inputs"] == {"pixels": tensor_digest(logits[i : i + 1]).hex()}
        assert row["output"] == tensor_digest(verdict.probabilities[i : i + 1]).hex()
        assert row["bundle"] == pipeline.bundle.digest  # type: ignore[union-attr]
        assert row["context"] == context["seq"]
        assert np.float32(row["score"]) == verdict.score[i]
        assert np.float32(row["p_value"]) == verdict.p_value[i]
        assert (row["label"], row["service_label"]) == (verdict.label[i], verdict.service_label[i])
    report = verify_log(tmp_path / "log")
    assert report.ok
    assert (report.lanes[0].rows, report.lanes[0].statuses) == (4, {"trusted": 3, "attacked": 1})


def test_a_restart_continues_the_chain(tmp_path: Path, pipeline: Pipeline) -> None:
    logits = fake_logits(2)
    pipeline.run(fake_query(logits), fake_service(logits))
    pipeline.close()
    again = Pipeline.from_settings(settings(tmp_path), tmp_path)
    again.run(fake_query(logits), fake_service(logits))
    again.close()
    assert [r["kind"] for r in records(tmp_path)] == ["context", "row", "row", "context", "row", "row"]
    assert verify_log(tmp_path / "log").ok


def test_two_processes_write_two_lanes(tmp_path: Path) -> None:
    first = LaneWriter(AuditOptions(path=str(tmp_path / "log")), {})
    second = LaneWriter(AuditOptions(path=str(tmp_path / "log")), {})
    for log in (first, second):
        log.put(1, lambda: [{"kind": "row"}])
    wait_until(lambda: first.line_counts["written"] + second.line_counts["written"] == 2, 10, "The writer")
    first.close()
    second.close()
    report = verify_log(tmp_path / "log")
    assert report.ok
    assert [lane.rows for lane in report.lanes] == [1, 1]


def test_attacked_rows_are_logged_whatever_the_sample(tmp_path: Path, bundle_folder: Path) -> None:
    pipeline = Pipeline.from_settings(settings(tmp_path, sample=0.0), tmp_path)
    logits = fake_logits(6)
    honest = fake_service(logits)
    pipeline.run(fake_query(logits), Prediction(switch_top_two(honest.probabilities, [0, 3]), honest.valid))
    pipeline.close()
    assert [r["status"] for r in records(tmp_path)[1:]] == ["attacked", "attacked"]


def test_a_new_log_is_for_its_owner_alone(tmp_path: Path, pipeline: Pipeline, caplog: pytest.LogCaptureFixture) -> None:
    pipeline.run(fake_query(fake_logits(1)), fake_service(fake_logits(1)))
    pipeline.close()
    for folder in (tmp_path / "log", tmp_path / "log" / "lane-00"):
        assert folder.stat().st_mode & 0o777 == 0o700
    assert not caplog.text
    (tmp_path / "log").chmod(0o777)
    Pipeline.from_settings(settings(tmp_path), tmp_path).close()
    assert "others may write" in caplog.text


@pytest.mark.parametrize(("option", "value"), [("fsnyc", "never"), ("sample", 2), ("path", "")])
def test_a_wrong_option_is_named(tmp_path: Path, bundle_folder: Path, option: str, value: object) -> None:
    with pytest.raises(SettingsError, match=option):
        Pipeline.from_settings(settings(tmp_path, **{option: value}), tmp_path)


def test_a_full_disk_never_blocks_and_the_loss_is_in_the_chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ENOSPC in the middle of a line, then space again."""
    full, real = threading.Event(), os.write

    def write(fd: int, data: bytes) -> int:
        if not full.is_set():
            return real(fd, data)
        real(fd, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(writer_module.os, "write", write)
    monkeypatch.setattr(writer_module, "RETRY_S", 0.05)
    log = LaneWriter(AuditOptions(path=str(tmp_path / "log")), {})
    log.put(1, lambda: [{"kind": "row", "request_id": "before"}])
    wait_until(lambda: log.line_counts["written"] == 1, 10, "The writer")
    full.set()
    start = time.monotonic()
    for _ in range(50):
        log.put(1, lambda: [{"kind": "row", "request_id": "lost"}])
    assert time.monotonic() - start < 1.0
    wait_until(lambda: log.line_counts["failed"] == 50, 10, "The writer")
    full.clear()
    time.sleep(0.06)
    log.put(1, lambda: [{"kind": "row", "request_id": "after"}])
    log.close()
    assert log.line_counts == {"written": 2, "dropped": 0, "failed": 50}
    report = verify_log(tmp_path / "log")
    assert report.ok, report.findings
    kept = records(tmp_path)
    assert [r["request_id"] for r in kept if r["kind"] == "row" and r["request_id"] != "lost"] == ["before", "after"]
    assert report.lanes[0].lost["failed"] == 50


def test_a_hanging_disk_never_blocks_and_memory_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow, real = threading.Event(), os.write

    def write(fd: int, data: bytes) -> int:
        slow.wait(10)
        return real(fd, data)

    monkeypatch.setattr(writer_module.os, "write", write)
    log = LaneWriter(AuditOptions(path=str(tmp_path / "log"), queue_rows=100), {})
    start = time.monotonic()
    accepted = sum(log.put(1, lambda: [{"kind": "row"}]) for _ in range(1000))
    assert time.monotonic() - start < 1.0
    assert accepted <= 100
    assert log.line_counts["dropped"] == 1000 - accepted
    slow.set()
    wait_until(lambda: log.line_counts["written"] == accepted, 10, "The writer")
    log.put(1, lambda: [{"kind": "row"}])
    log.close()
    report = verify_log(tmp_path / "log")
    assert report.ok
    assert report.lanes[0].lost == {"dropped": 1000 - accepted}


def test_a_record_that_is_no_json_is_counted_and_the_rest_goes_on(tmp_path: Path) -> None:
    log = LaneWriter(AuditOptions(path=str(tmp_path / "log")), {})
    log.put(1, lambda: [{"kind": "row", "request_id": b"bytes"}])
    log.put(1, lambda: [{"kind": "row", "request_id": 'text\n\u2028"}'}])
    log.close()
    assert log.line_counts == {"written": 1, "dropped": 0, "failed": 1}
    assert verify_log(tmp_path / "log").ok


def test_the_plug_in_costs_the_pipeline_nothing_when_the_disk_hangs(
    tmp_path: Path, bundle_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release, real = threading.Event(), os.write
    monkeypatch.setattr(writer_module.os, "write", lambda fd, data: (release.wait(20), real(fd, data))[1])
    pipeline = Pipeline.from_settings(settings(tmp_path, queue_rows=50), tmp_path)
    plugin = pipeline.manager.get_plugin("audit")
    assert isinstance(plugin, AuditLog)
    logits = fake_logits(4)
    start = time.monotonic()
    for _ in range(100):
        assert pipeline.run(fake_query(logits), fake_service(logits)).counts()["trusted"] == 4
    assert time.monotonic() - start < 5.0
    assert not pipeline.plugin_errors
    assert plugin.line_counts["dropped"] >= 300
    release.set()
    pipeline.close()
    assert verify_log(tmp_path / "log").ok


KILLED = textwrap.dedent(
    """
    import sys, itertools
    from fides_plugins.audit.writer import AuditOptions, LaneWriter
    log = LaneWriter(AuditOptions(path=sys.argv[1], rotate_bytes=20_000, fsync="never"), {"service": "t"})
    print("ready", flush=True)
    for i in itertools.count():
        log.put(1, lambda: [{"kind": "row", "time": "t", "request_id": f"r{i}", "padding": "x" * (i % 300)}])
    """
)


def test_kill_9_at_any_moment_leaves_a_log_that_verifies(tmp_path: Path) -> None:
    """The same log, killed and continued twelve times at random moments."""
    rng = np.random.default_rng(0)
    lines = 0
    for _ in range(12):
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(tmp_path / "log")], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(float(rng.uniform(0.02, 0.25)))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        report = verify_log(tmp_path / "log")
        assert report.ok, [str(f) for f in report.findings]
        assert report.lanes[0].lines >= lines
        lines = report.lanes[0].lines
    assert len(report.lanes) == 1
    assert lines > 100
    small_log(tmp_path / "log", 1)
    assert verify_log(tmp_path / "log").ok
