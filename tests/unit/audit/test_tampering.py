"""Every tampering of a log is found: lines, files, heads, keys, and what was rolled back behind an anchor."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest

from fides_plugins.audit.anchor import read_anchors
from fides_plugins.audit.chain import Head, read_key
from fides_plugins.audit.verify import LogReport, verify_log
from fides_plugins.audit.writer import AuditOptions, LaneWriter
from fides_plugins.errors import InputError, SettingsError
from fides_plugins.launch.process import wait_until
from fides_plugins.pipeline import Pipeline
from tests.support.audit_logs import segment, settings, small_log


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
