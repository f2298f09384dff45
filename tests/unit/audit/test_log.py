"""The audit log: what it holds, and that every tampering of a small log is found."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fides_plugins.attestation.tensors import tensor_digest
from fides_plugins.audit import writer as writer_module
from fides_plugins.audit.anchor import read_anchors
from fides_plugins.audit.chain import Head, read_key
from fides_plugins.audit.log import AuditLog
from fides_plugins.audit.verify import LogReport, verify_log
from fides_plugins.audit.writer import AuditOptions, LaneWriter
from fides_plugins.errors import InputError, SettingsError
from fides_plugins.launch.process import wait_until
from fides_plugins.pipeline import Pipeline
from fides_plugins.settings import Settings
from fides_plugins.testing import fake_logits, fake_query, fake_service, switch_top_two
from fides_plugins.types import Prediction


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


@pytest.fixture
def pipeline(tmp_path: Path, bundle_folder: Path) -> Iterator[Pipeline]:
    made = Pipeline.from_settings(settings(tmp_path), tmp_path)
    yield made
    made.close()


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


def tampered(folder: Path, copy: Path, lines: dict[Path, list[bytes]]) -> LogReport:
    shutil.copytree(folder, copy)
    for path, content in lines.items():
        (copy / path.relative_to(folder)).write_bytes(b"".join(content))
    report = verify_log(copy)
    shutil.rmtree(copy)
    return report


@pytest.mark.parametrize("rotate_bytes", [1 << 20, 700], ids=["one segment", "several segments"])
def test_every_removal_swap_and_edit_is_found(tmp_path: Path, rotate_bytes: int) -> None:
    """Exhaustive on a small log: each line removed, each pair exchanged, each repetition, each byte changed."""
    log, copy = tmp_path / "log", tmp_path / "copy"
    small_log(log, 8, rotate_bytes=rotate_bytes)
    files = sorted(log.glob("lane-00/*.jsonl"))
    assert (len(files) > 1) == (rotate_bytes == 700)
    lines = {f: f.read_bytes().splitlines(keepends=True) for f in files}
    places = [(f, i) for f in files for i in range(len(lines[f]))]
    assert len(places) >= 9
    assert tampered(log, copy, lines).ok

    for f, i in places:
        removed = {**lines, f: lines[f][:i] + lines[f][i + 1 :]}
        assert not tampered(log, copy, removed).ok, ("removed", f.name, i)
        repeated = {**lines, f: lines[f][: i + 1] + lines[f][i:]}
        assert not tampered(log, copy, repeated).ok, ("repeated", f.name, i)
    for n, (f, i) in enumerate(places):
        for g, j in places[n + 1 :]:
            swapped = {p: list(content) for p, content in lines.items()}
            swapped[f][i], swapped[g][j] = swapped[g][j], swapped[f][i]
            assert not tampered(log, copy, swapped).ok, ("swapped", i, j)
    for f, i in places:
        for at in range(0, len(lines[f][i])):
            edited = bytearray(lines[f][i])
            edited[at] ^= 1
            content = {f: [*lines[f][:i], bytes(edited), *lines[f][i + 1 :]]}
            assert not tampered(log, copy, content).ok, ("edited", f.name, i, at)


def test_removed_files_and_a_changed_head_are_found(tmp_path: Path) -> None:
    log = tmp_path / "log"
    small_log(log, 12, rotate_bytes=4096 // 8)
    files = sorted(log.glob("lane-00/*.jsonl"))
    assert len(files) > 3
    for path in [*files, log / "lane-00" / "HEAD"]:
        content = path.read_bytes()
        path.unlink()
        assert not verify_log(log).ok, path.name
        path.write_bytes(content)
    assert verify_log(log).ok
    head = log / "lane-00" / "HEAD"
    good = head.read_bytes()
    for at in range(len(good)):
        bad = bytearray(good)
        bad[at] ^= 1
        head.write_bytes(bytes(bad))
        assert not verify_log(log).ok, at
    head.write_bytes(good)
    files[0].unlink()
    assert "--archived" in str(verify_log(log).findings[0])
    assert verify_log(log, archived=True).ok
    files[2].unlink()
    assert not verify_log(log, archived=True).ok


def test_an_anchor_finds_a_log_that_was_rolled_back_with_its_head(tmp_path: Path) -> None:
    log = tmp_path / "log"
    small_log(log, 3)
    shutil.copytree(log, tmp_path / "old")
    small_log(log, 3)
    (tmp_path / "anchor.json").write_text(json.dumps(verify_log(log).to_json()))
    anchors = read_anchors(tmp_path / "anchor.json")
    assert verify_log(log, anchors=anchors).ok
    small_log(log, 3)
    assert verify_log(log, anchors=anchors).ok
    assert verify_log(tmp_path / "old").ok
    assert not verify_log(tmp_path / "old", anchors=anchors).ok
    assert not verify_log(log, anchors={"lane-07": [Head(3, "a" * 64)]}).ok
    with pytest.raises(InputError, match="--json"):
        read_anchors(log / "lane-00" / "00000000.jsonl")


def test_with_a_key_only_its_holder_can_write_the_chain(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("0123456789abcdef0123\n")
    key = read_key(tmp_path / "key")
    small_log(tmp_path / "log", 3, key=key)
    assert verify_log(tmp_path / "log", key=key).ok
    assert not verify_log(tmp_path / "log").ok
    small_log(tmp_path / "forged", 3)
    assert not verify_log(tmp_path / "forged", key=key).ok
    (tmp_path / "key").write_text("short")
    with pytest.raises(SettingsError, match="16"):
        read_key(tmp_path / "key")


KEY = b"0123456789abcdef0123"


def cut(log: Path, n: int) -> None:
    """Keep the first lines of a log, and write the HEAD that belongs to them, as anybody can who has no key."""
    path = log / "lane-00" / "00000000.jsonl"
    kept = path.read_bytes().splitlines(keepends=True)[:n]
    path.write_bytes(b"".join(kept))
    record = json.loads(kept[-1])
    head = log / "lane-00" / "HEAD"
    forged = json.dumps({"seq": record["seq"], "hash": record["hash"]})
    head.write_text(forged.ljust(head.stat().st_size - 1) + "\n")


def test_a_keyed_log_cannot_be_cut_without_the_key(tmp_path: Path) -> None:
    small_log(tmp_path / "log", 50, key=KEY)
    assert verify_log(tmp_path / "log", key=KEY).lanes[0].lines == 51
    cut(tmp_path / "log", 3)
    report = verify_log(tmp_path / "log", key=KEY)
    assert any("HEAD" in str(f) for f in report.findings)
    # The next run does not go on where the forger wants it to.
    small_log(tmp_path / "log", 1, key=KEY)
    assert segment(tmp_path, lane=1).is_file()


def test_every_byte_of_a_keyed_head_matters(tmp_path: Path) -> None:
    small_log(tmp_path / "log", 3, key=KEY)
    head = tmp_path / "log" / "lane-00" / "HEAD"
    good = head.read_bytes()
    for at in range(len(good)):
        bad = bytearray(good)
        bad[at] ^= 1
        head.write_bytes(bad)
        assert not verify_log(tmp_path / "log", key=KEY).ok, at


def test_a_keyed_lane_cannot_take_the_place_of_another(tmp_path: Path) -> None:
    writers = [LaneWriter(AuditOptions(path=str(tmp_path / "log")), {}, KEY) for _ in range(2)]
    for log in writers:
        log.put(1, lambda: [{"kind": "row"}])
    wait_until(lambda: sum(log.line_counts["written"] for log in writers) == 2, 10, "The writers")
    for log in writers:
        log.close()
    assert verify_log(tmp_path / "log", key=KEY).ok
    shutil.rmtree(tmp_path / "log" / "lane-00")
    (tmp_path / "log" / "lane-01").rename(tmp_path / "log" / "lane-00")
    assert not verify_log(tmp_path / "log", key=KEY).ok


@pytest.mark.parametrize("key", [None, KEY], ids=["plain", "keyed"])
def test_anchors_elsewhere_find_what_was_rolled_back_with_its_head(tmp_path: Path, key: bytes | None) -> None:
    """A host that kept an older state of the whole folder can put it back, and let the log go on from there."""
    log, anchors = tmp_path / "log", tmp_path / "elsewhere" / "anchors.jsonl"
    anchors.parent.mkdir()
    small_log(log, 3, key=key, anchor_file=str(anchors))
    assert anchors.stat().st_mode & 0o077 == 0
    shutil.copytree(log, tmp_path / "old")
    small_log(log, 20, key=key, anchor_file=str(anchors))
    kept = read_anchors(anchors)
    seqs = [head.seq for head in kept["lane-00"]]
    assert (seqs[-1], 3 in seqs) == (24, True)
    assert verify_log(log, key, kept).ok
    # What a power cut left of the last anchor is not one.
    with anchors.open("a") as stream:
        stream.write('{"lane": "lane-0')
    assert read_anchors(anchors) == kept
    anchors.write_text("".join(anchors.read_text().splitlines(keepends=True)[:-1]))

    shutil.rmtree(log)
    shutil.copytree(tmp_path / "old", log)
    assert verify_log(log, key).ok
    assert "the end was removed" in str(verify_log(log, key, kept).findings[0])
    # Lines and anchors that came after the rollback do not hide it.
    small_log(log, 40, key=key, anchor_file=str(anchors))
    assert verify_log(log, key).ok
    assert not verify_log(log, key, read_anchors(anchors)).ok
    shutil.rmtree(log / "lane-00")
    small_log(log, 40, key=key, anchor_file=str(anchors))
    assert not verify_log(log, key, read_anchors(anchors)).ok


def test_anchors_come_at_an_interval_and_at_the_end(tmp_path: Path) -> None:
    anchors = tmp_path / "anchors.jsonl"
    options = AuditOptions(path=str(tmp_path / "log"), anchor_file=str(anchors), anchor_interval_s=0.3)
    log = LaneWriter(options, {})
    for n in range(1, 4):
        log.put(1, lambda: [{"kind": "row"}])
        # Nothing is written after it: the anchor comes by itself.
        wait_until(lambda n=n: anchors.exists() and read_anchors(anchors)["lane-00"][-1].seq == n, 10, "The anchor")
    time.sleep(0.7)
    assert len(read_anchors(anchors)["lane-00"]) == 3
    for _ in range(200):
        log.put(1, lambda: [{"kind": "row"}])
        time.sleep(0.001)
    log.close()
    kept = read_anchors(anchors)["lane-00"]
    assert 4 <= len(kept) <= 6
    assert kept[-1].seq == 203
    assert verify_log(tmp_path / "log", anchors={"lane-00": kept}).ok


def test_anchors_that_cannot_be_written_are_said_and_cost_no_line(
    tmp_path: Path, bundle_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    small_log(tmp_path / "log", 3, anchor_file=str(tmp_path / "gone" / "anchors.jsonl"))
    assert "anchor" in caplog.text
    assert verify_log(tmp_path / "log").lanes[0].rows == 3
    with pytest.raises(SettingsError, match="anchor_file"):
        Pipeline.from_settings(settings(tmp_path, anchor_file=str(tmp_path / "gone" / "anchors.jsonl")), tmp_path)
    caplog.clear()
    Pipeline.from_settings(settings(tmp_path, anchor_file=str(tmp_path / "anchors.jsonl")), tmp_path).close()
    assert "same file system" in caplog.text


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"lane": 1}\n', "no\n", '{"lane": "lane-00", "seq": "x", "hash": ""}\n']
)
def test_files_that_are_no_anchors_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "anchors").write_text(text)
    with pytest.raises(InputError, match="anchor_file"):
        read_anchors(tmp_path / "anchors")


def test_a_new_log_is_for_its_owner_alone(tmp_path: Path, pipeline: Pipeline, caplog: pytest.LogCaptureFixture) -> None:
    pipeline.run(fake_query(fake_logits(1)), fake_service(fake_logits(1)))
    pipeline.close()
    for folder in (tmp_path / "log", tmp_path / "log" / "lane-00"):
        assert folder.stat().st_mode & 0o777 == 0o700
    assert not caplog.text
    (tmp_path / "log").chmod(0o777)
    Pipeline.from_settings(settings(tmp_path), tmp_path).close()
    assert "others may write" in caplog.text


def test_a_lane_whose_end_was_cut_is_left_alone_by_the_next_run(tmp_path: Path) -> None:
    log = tmp_path / "log"
    small_log(log, 5)
    path = segment(tmp_path)
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-2]))
    before = path.read_bytes()
    small_log(log, 2)
    assert path.read_bytes() == before
    report = verify_log(log)
    assert not report.ok
    assert {f.lane for f in report.findings} == {"lane-00"}
    assert report.lanes[1].rows == 2


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
