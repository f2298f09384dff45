"""`fides audit run` on small recordings: columns, formats, bad rows, resumption, refusals."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fides_plugins.batch.job import judge_here, prepare
from fides_plugins.batch.run import audit_run
from fides_plugins.bundle import InputSpec
from fides_plugins.errors import FidesError, InputError, SettingsError
from fides_plugins.pipeline import Pipeline
from fides_plugins.settings import Settings
from fides_plugins.testing import make_bundle
from fides_plugins.types import Prediction, Query
from tests.support.recordings import PAIRS, recorded, write_jsonl, write_parquet
from tests.support.triton_models import image_bundle, images

FIELDS = [
    "row",
    "status",
    "score",
    "p_value",
    "service_label",
    "verified_label",
    "label",
    "corrected",
    "refused",
    "reason",
]


def judged(tmp_path: Path, source: Path, name: str = "out.parquet", **options: Any) -> tuple[pa.Table, dict[str, Any]]:
    summary = audit_run(tmp_path / "bundle", source, tmp_path / name, **options)
    return pq.read_table(tmp_path / name), summary


def test_verdicts_are_those_of_the_pipeline(tmp_path: Path, bundle_folder: Path) -> None:
    columns = recorded(500)
    source = write_parquet(tmp_path / "in.parquet", columns, *PAIRS)
    table, summary = judged(tmp_path, source, settings=Settings(mode="reject"), part_rows=200)
    assert [n for n in table.column_names if n not in ("request_id", "probabilities")] == FIELDS
    assert table["request_id"].to_pylist() == columns["request_id"].tolist()
    assert table["row"].to_pylist() == list(range(500))

    pipeline = Pipeline.from_settings(Settings(bundle=str(bundle_folder), mode="reject"))
    service = Prediction.from_output(columns["service_probabilities"], "probabilities")
    verdict = pipeline.run(Query({"pixels": columns["input"]}), service)
    assert table["status"].to_pylist() == verdict.status_text.tolist()
    np.testing.assert_allclose(table["score"].to_numpy(), verdict.score, atol=1e-6)
    np.testing.assert_allclose(table["p_value"].to_numpy(), verdict.p_value, atol=1e-3)
    for name in ("service_label", "verified_label", "label", "corrected", "refused"):
        np.testing.assert_array_equal(table[name].to_numpy(), getattr(verdict, name))
    np.testing.assert_allclose(np.stack(table["probabilities"].to_numpy()), verdict.probabilities, atol=1e-6)

    assert summary["rows"] == 500
    assert summary["statuses"] == verdict.counts()
    assert summary["refused"] == verdict.counts()["attacked"] > 15
    assert summary["more_than_false_alarms"]
    low, high = summary["attacked_interval"]
    assert low < columns["attacked"].mean() < high


@pytest.mark.parametrize("service", ["service_probabilities", "service_logits"])
@pytest.mark.parametrize("reference", ["verification_probabilities", "verification_logits", "input"])
@pytest.mark.parametrize("write", [write_parquet, write_jsonl])
def test_every_pair_of_columns_gives_the_same_statuses(
    tmp_path: Path, bundle_folder: Path, service: str, reference: str, write: Any
) -> None:
    columns = recorded(120)
    table, _ = judged(tmp_path, write(tmp_path / "in", columns, "request_id", service, reference), part_rows=50)
    expected, _ = judged(tmp_path, write_parquet(tmp_path / "in2", columns, *PAIRS), "expected.parquet")
    assert table["status"].to_pylist() == expected["status"].to_pylist()
    np.testing.assert_allclose(table["score"].to_numpy(), expected["score"].to_numpy(), atol=1e-5)


def test_without_request_ids_and_probabilities(tmp_path: Path, bundle_folder: Path) -> None:
    source = write_parquet(tmp_path / "in", recorded(20), *PAIRS[1:])
    table, _ = judged(tmp_path, source, probabilities=False)
    assert table.column_names == FIELDS


def test_a_bad_row_is_one_bad_row(tmp_path: Path, bundle_folder: Path) -> None:
    good = [0.91, *[0.01] * 9]
    rows: list[Any] = [
        {"request_id": "good", "service_probabilities": good, "verification_probabilities": good},
        {"request_id": "short", "service_probabilities": good[:3], "verification_probabilities": good},
        {"request_id": "null", "service_probabilities": None, "verification_probabilities": good},
        {"request_id": "nan", "service_probabilities": [float("nan")] * 10, "verification_probabilities": good},
        {"request_id": "text", "service_probabilities": ["x"] * 10, "verification_probabilities": good},
        {"request_id": "no reference", "service_probabilities": good, "verification_probabilities": None},
        {"request_id": 7, "service_probabilities": good, "verification_probabilities": good},
    ]
    lines = [json.dumps(r) for r in rows]
    (tmp_path / "in.jsonl").write_text("\n".join([lines[0], "", "{broken", *lines[1:]]) + "\n")
    table, summary = judged(tmp_path, tmp_path / "in.jsonl", part_rows=3)
    assert table["request_id"].to_pylist() == ["good", None, "short", "null", "nan", "text", "no reference", "7"]
    statuses = ["trusted", "error", "error", "error", "error", "error", "indeterminate", "trusted"]
    assert table["status"].to_pylist() == statuses
    assert table["score"].to_pylist()[6] is None
    assert summary["rows"] == 8

    kept = [r for r in rows if r["request_id"] in ("good", "short", "null", "no reference")]
    pq.write_table(pa.Table.from_pylist(kept), tmp_path / "in.parquet")
    table, _ = judged(tmp_path, tmp_path / "in.parquet", "two.parquet")
    assert table["status"].to_pylist() == ["trusted", "error", "error", "indeterminate"]


#: Fields of a row that a stranger could have written, as JSON; the others are usable.
HOSTILE = {
    "a number of 400 digits": {"service_probabilities": f"[{'9' * 400}]"},
    "a number of 5,000 digits": {"service_probabilities": f"[{'9' * 5000}]"},
    "100,000 lists": {"service_probabilities": "[" * 100_000 + "]" * 100_000},
    "a lone surrogate": {"request_id": r'"\ud800"', "service_probabilities": "null"},
    "a reference of 400 digits": {"REFERENCE": f"[{'9' * 400}]"},
    "a reference of another depth": {"REFERENCE": "[[[1.0]]]"},
    "a line that is too long": {"request_id": f'"{"x" * 300_000}"'},
}


@pytest.mark.parametrize("reference", ["verification_probabilities", "input"])
@pytest.mark.parametrize("place", [0, 7, 10])
@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_row_is_one_bad_row(
    tmp_path: Path, bundle_folder: Path, monkeypatch: pytest.MonkeyPatch, kind: str, place: int, reference: str
) -> None:
    # Seven rows a part and four a batch: the row also meets the borders of both.
    monkeypatch.setattr("fides_plugins.batch.records.MAX_BATCH_ROWS", 4)
    monkeypatch.setattr("fides_plugins.batch.records.MAX_LINE_BYTES", 250_000, raising=False)
    probabilities = [0.91, *[0.01] * 9]
    good = json.dumps(probabilities)
    usable = {"request_id": '"good"', "service_probabilities": good, "REFERENCE": good}
    if reference == "input":
        usable["REFERENCE"] = json.dumps(np.log(probabilities).tolist())

    def line(fields: dict[str, str]) -> str:
        return "{" + ", ".join(f'"{name}": {value}' for name, value in fields.items()) + "}\n"

    lines = [line(usable)] * 20
    lines.insert(place, line(usable | HOSTILE[kind]))
    (tmp_path / "in.jsonl").write_text("".join(lines).replace("REFERENCE", reference))
    table, summary = judged(tmp_path, tmp_path / "in.jsonl", part_rows=7)
    statuses = table["status"].to_pylist()
    assert statuses.pop(place) in ("error", "indeterminate")
    assert statuses == ["trusted"] * 20
    assert summary["rows"] == 21


@pytest.mark.parametrize("write", [write_parquet, write_jsonl])
def test_one_row_does_not_choose_the_length_of_a_free_axis(tmp_path: Path, write: Any) -> None:
    make_bundle(tmp_path / "bundle", input=InputSpec(name="pixels", dtype="float32", shape=(None, None)))
    columns = recorded(100, share=0)
    values = columns["input"].tolist()
    values[0] = [0.0] * 1_000_000
    rows = [
        {"service_probabilities": claimed.tolist(), "input": value}
        for claimed, value in zip(columns["service_probabilities"], values, strict=True)
    ]
    if write is write_parquet:
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "in")
    else:
        (tmp_path / "in").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tracemalloc.start()
    table, _ = judged(tmp_path, tmp_path / "in")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert table["status"].to_pylist()[0] == "indeterminate"
    assert table["status"].to_pylist().count("trusted") >= 90
    # A hundred rows of a million numbers would be 400 MB and more.
    assert peak < 200e6


def varint(number: int) -> bytes:
    """A 64-bit integer as the footer of a Parquet file holds it: zigzag, seven bits a byte."""
    number, out = number << 1, bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


@pytest.mark.parametrize(
    ("claim", "places"),
    [(2_000_000_000_000, 1), (2_000_000_000_000, -1), (10_000, 1), (10_000, -1), (1, 1)],
)
def test_a_footer_that_claims_other_rows_is_refused(
    tmp_path: Path, bundle_folder: Path, claim: int, places: int
) -> None:
    file = write_parquet(tmp_path / "in.parquet", recorded(7777), *PAIRS)
    data = file.read_bytes()
    length = int.from_bytes(data[-8:-4], "little")
    footer = data[-8 - length : -8].replace(varint(7777), varint(claim), places)
    file.write_bytes(data[: -8 - length] + footer + len(footer).to_bytes(4, "little") + b"PAR1")
    with pytest.raises(InputError, match=r"claims|ends early"):
        judged(tmp_path, file)


def test_damaged_parquet_is_refused(tmp_path: Path, bundle_folder: Path) -> None:
    file = write_parquet(tmp_path / "in.parquet", recorded(500), *PAIRS)
    data = bytearray(file.read_bytes())
    data[100:4000] = bytes(3900)
    file.write_bytes(data)
    with pytest.raises(InputError, match="Parquet"):
        judged(tmp_path, file)


def test_a_column_that_is_there_twice_is_refused(tmp_path: Path, bundle_folder: Path) -> None:
    column = pa.array([[0.91, *[0.01] * 9]])
    names = ["service_probabilities", "verification_probabilities", "verification_probabilities"]
    pq.write_table(pa.Table.from_arrays([column] * 3, names), tmp_path / "in.parquet")
    with pytest.raises(InputError, match="Columns:"):
        judged(tmp_path, tmp_path / "in.parquet")


@pytest.mark.parametrize(("nested", "misfit"), [(True, [[[1.0]]]), (False, [1.0])], ids=["nested", "flat"])
def test_image_inputs_flat_and_nested(tmp_path: Path, nested: bool, misfit: list[Any]) -> None:
    image_bundle(tmp_path / "bundle")
    columns = recorded(30)
    array = images(columns["verification_logits"])
    values: list[Any] = array.tolist() if nested else array.reshape(30, -1).tolist()
    values[4], values[5] = None, misfit
    pq.write_table(
        pa.table({"service_probabilities": columns["service_probabilities"].tolist(), "input": values}), tmp_path / "in"
    )
    table, _ = judged(tmp_path, tmp_path / "in", part_rows=16)
    statuses = np.array(table["status"].to_pylist())
    assert statuses[[4, 5]].tolist() == ["indeterminate"] * 2
    expected = np.where(columns["attacked"], "attacked", "trusted")
    assert (np.delete(statuses, [4, 5]) == np.delete(expected, [4, 5])).sum() >= 27


def test_a_stopped_run_goes_on_and_gives_the_same_file(
    tmp_path: Path, bundle_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_parquet(tmp_path / "in", recorded(1000), *PAIRS, row_group_size=130)
    expected, _ = judged(tmp_path, source, part_rows=100)

    class Stop(Exception): ...

    def stop_after(n: int) -> Any:
        seen = [0]

        def on_rows(rows: int) -> None:
            seen[0] += rows
            if seen[0] >= n:
                raise Stop

        return on_rows

    for n in (250, 30, 400):
        with pytest.raises(Stop):
            judged(tmp_path, source, "again.parquet", part_rows=100, on_rows=stop_after(n))
        assert not (tmp_path / "again.parquet").exists()
    table, summary = judged(tmp_path, source, "again.parquet", part_rows=100)
    assert summary["resumed_rows"] == 500
    assert table.equals(expected)
    assert not (tmp_path / "again.parquet.partial").exists()
    assert (tmp_path / "again.parquet").read_bytes() == (tmp_path / "out.parquet").read_bytes()


def test_what_another_run_left_is_refused(tmp_path: Path, bundle_folder: Path) -> None:
    source = write_parquet(tmp_path / "in", recorded(50), *PAIRS)
    job = prepare(bundle_folder, source, tmp_path / "out.parquet")
    prepare(bundle_folder, source, tmp_path / "out.parquet", Settings(false_alarm_rate=0.1))
    prepare(bundle_folder, source, tmp_path / "out.parquet")
    judge_here(job)
    with pytest.raises(InputError, match="another input"):
        prepare(bundle_folder, source, tmp_path / "out.parquet", Settings(false_alarm_rate=0.1))
    write_parquet(tmp_path / "in", recorded(50, seed=9), *PAIRS)
    with pytest.raises(InputError, match="another input"):
        prepare(bundle_folder, source, tmp_path / "out.parquet")


def test_a_change_in_the_middle_of_the_input_is_another_input(tmp_path: Path, bundle_folder: Path) -> None:
    """Of the same size, and far from both ends: what was judged before must not be mixed with it."""
    source = write_jsonl(tmp_path / "in.jsonl", recorded(2000), *PAIRS)
    judge_here(prepare(bundle_folder, source, tmp_path / "out.parquet"))
    text = source.read_bytes()
    at = text.index(b"0.", len(text) // 2)
    source.write_bytes(text[:at] + b"9." + text[at + 2 :])
    assert 2**17 < at < len(text) - 2**17
    with pytest.raises(InputError, match="another input"):
        prepare(bundle_folder, source, tmp_path / "out.parquet")


def test_one_run_at_a_time(tmp_path: Path, bundle_folder: Path) -> None:
    source = write_parquet(tmp_path / "in", recorded(50), *PAIRS)

    def meanwhile(total: int, done: int) -> None:
        with pytest.raises(InputError, match="Another run"):
            judged(tmp_path, source)

    assert judged(tmp_path, source, on_start=meanwhile)[1]["rows"] == 50


@pytest.mark.parametrize(
    "names",
    [
        ("service_probabilities",),
        ("verification_probabilities",),
        ("service_probabilities", "service_logits", "input"),
        ("service_probabilities", "verification_probabilities", "verification_logits"),
    ],
)
@pytest.mark.parametrize("write", [write_parquet, write_jsonl])
def test_missing_and_doubled_columns_are_refused(
    tmp_path: Path, bundle_folder: Path, names: tuple[str, ...], write: Any
) -> None:
    with pytest.raises(InputError, match="Columns:"):
        judged(tmp_path, write(tmp_path / "in", recorded(5), *names))


@pytest.mark.parametrize("content", [b"hello\n", b"", b"PAR1 not really"])
def test_files_that_are_no_recording_are_refused(tmp_path: Path, bundle_folder: Path, content: bytes) -> None:
    (tmp_path / "in").write_bytes(content)
    with pytest.raises(InputError):
        judged(tmp_path, tmp_path / "in")


def test_a_file_that_is_not_there_is_refused(tmp_path: Path, bundle_folder: Path) -> None:
    with pytest.raises(InputError):
        judged(tmp_path, tmp_path / "absent")


def test_an_unknown_engine_is_refused(tmp_path: Path, bundle_folder: Path) -> None:
    source = write_parquet(tmp_path / "in", recorded(5), *PAIRS)
    with pytest.raises(SettingsError, match="engine"):
        judged(tmp_path, source, engine="spark")


def test_what_lies_at_the_output_is_kept(tmp_path: Path, bundle_folder: Path) -> None:
    source = write_parquet(tmp_path / "in", recorded(5), *PAIRS)
    (tmp_path / "out.parquet").write_text("mine")
    with pytest.raises(InputError, match="exists"):
        judged(tmp_path, source)
    assert (tmp_path / "out.parquet").read_text() == "mine"


def test_inputs_need_something_that_verifies(tmp_path: Path) -> None:
    make_bundle(tmp_path / "bundle", verification=None)
    with pytest.raises(FidesError, match="verification"):
        judged(tmp_path, write_parquet(tmp_path / "in", recorded(5), "service_probabilities", "input"))
    table, _ = judged(tmp_path, write_parquet(tmp_path / "in", recorded(5, share=0), *PAIRS))
    assert table["status"].to_pylist() == ["trusted"] * 5


@pytest.mark.parametrize("write", [write_parquet, write_jsonl])
def test_a_free_axis_takes_its_length_from_the_recording(tmp_path: Path, write: Any) -> None:
    make_bundle(tmp_path / "bundle", input=InputSpec(name="pixels", dtype="float32", shape=(None, None)))
    table, _ = judged(tmp_path, write(tmp_path / "in", recorded(20, share=0), "service_probabilities", "input"))
    assert table["status"].to_pylist().count("trusted") >= 18


def test_the_serving_log_is_not_written_by_an_audit(tmp_path: Path, bundle_folder: Path) -> None:
    settings = Settings.from_mapping(
        {
            "plugins": {
                "load": ["fides_plugins.audit:audit"],
                "required": ["audit"],
                "options": {"audit": {"path": str(tmp_path / "log")}},
            }
        }
    )
    judged(tmp_path, write_parquet(tmp_path / "in", recorded(5), *PAIRS), settings=settings)
    assert not (tmp_path / "log").exists()
