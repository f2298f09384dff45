"""Recorded predictions: find their columns, cut them into parts, and read the rows of a part in batches.

A part is a range of rows with a fixed place in the file, so that any worker can read any part, and a
run that was stopped goes on at the first part that is missing. Formats: Parquet, and JSON Lines with
one object per row.

A recording holds what clients and services wrote. What one of them put into one row is that row's fault
alone, and what a file claims about itself is held against its size before anything is planned.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from fides_plugins.errors import InputError
from fides_plugins.types import BoolArray, Float32Array, IntArray

SERVICE_COLUMNS = ("service_probabilities", "service_logits")
VERIFICATION_COLUMNS = ("verification_probabilities", "verification_logits")
INPUT_COLUMN = "input"
ID_COLUMN = "request_id"
#: Rows of one part: what a killed run does again at most.
PART_ROWS = 50_000
#: Bytes of decoded rows that one batch should hold.
BATCH_BYTES = 16 * 1024 * 1024
MAX_BATCH_ROWS = 8192
#: A longer line of JSON is one bad row; its rest is skipped, not kept.
MAX_LINE_BYTES = 128 * 1024 * 1024
#: Rows that a Parquet file may claim for each of its bytes; real rows take many bytes each.
MAX_ROWS_PER_BYTE = 1000
MAX_ROWS = 10**9
_READ_BUFFER = 1 << 20
_JSON_BLOCK = 1 << 22
_HASH_BLOCK = 1 << 20

_FORMAT_HELP = (
    "Columns: service_probabilities or service_logits; verification_probabilities, verification_logits or input; "
    "optionally request_id."
)


@dataclass(frozen=True)
class Part:
    """A range of rows: `start` and `rows` count from the first row of the file; `offset` is its first byte."""

    index: int
    start: int
    rows: int
    offset: int = 0


@dataclass(frozen=True)
class Recording:
    """A file of recorded predictions, and how it is read.

    Attributes
    ----------
    service, reference:
        Names of the columns that are used; `reference` is a verification column or `input`.
    request_ids:
        Whether there is a column `request_id`.
    batch_rows:
        Rows handed to the pipeline at once; part of the plan, so that every run sees the same batches.
    fingerprint:
        SHA-256 of the whole file: a change anywhere in it must not be mixed with what was judged before.
    """

    path: str
    format: Literal["parquet", "jsonl"]
    service: str
    reference: str
    request_ids: bool
    n_rows: int
    batch_rows: int
    parts: tuple[Part, ...]
    fingerprint: str


def open_recording(path: str | Path, part_rows: int = PART_ROWS) -> Recording:
    """Look at a file and plan its parts; reads the schema, or counts the lines of JSON.

    Raises
    ------
    InputError
        If the file cannot be read, or lacks or doubles a column.
    """
    file = Path(path)
    if not file.is_file():
        raise InputError(f"There is no file {file.name!r}.", "Give a Parquet or JSON Lines file.")
    with file.open("rb") as stream:
        parquet = stream.read(4) == b"PAR1"
    recording = (_open_parquet if parquet else _open_jsonl)(file, part_rows)
    if not recording.n_rows:
        raise InputError(f"{file.name} has no rows.")
    return recording


def read_part(recording: Recording, parts: Sequence[Part]) -> Iterator[tuple[Part, pa.Table]]:
    """Batches of at most `batch_rows` rows of neighbouring parts, each with its part; never across two parts."""
    if not parts:
        return
    read = _readable_parquet if recording.format == "parquet" else _read_jsonl
    batches = read(recording, parts[0], sum(p.rows for p in parts))
    rest = pa.table({})
    for part in parts:
        left = part.rows
        while left:
            while rest.num_rows < min(left, recording.batch_rows):
                more = next(batches, None)
                if more is None:
                    raise InputError(f"{Path(recording.path).name} ends early.", "Was it changed during the run?")
                rest = pa.concat_tables([rest, more]) if rest.num_rows else more
            batch = rest.slice(0, min(left, recording.batch_rows))
            rest = rest.slice(batch.num_rows)
            left -= batch.num_rows
            yield part, batch


def matrix(column: pa.ChunkedArray, width: int) -> tuple[Float32Array, IntArray]:
    """A column of lists of numbers as (N, width) float32, and the length of each list.

    Rows that are null (length -1) or of another length are NaN.

    Raises
    ------
    InputError
        If the column does not hold lists of numbers.
    """
    array = column.combine_chunks()
    if not _is_list(array.type) or not _is_number(array.type.value_type):
        raise InputError(f"A column holds {array.type}; expected lists of numbers.", _FORMAT_HELP)
    lengths = pc.fill_null(pc.list_value_length(array), -1).to_numpy(zero_copy_only=False).astype(np.int64)
    good = lengths == width
    result = np.full((len(array), width), np.nan, dtype=np.float32)
    result[good] = array.filter(pa.array(good)).flatten().to_numpy(zero_copy_only=False).reshape(-1, width)
    return result, lengths


def tensor(
    column: pa.ChunkedArray, shape: Sequence[int | None], dtype: np.dtype[Any]
) -> tuple[NDArray[Any], BoolArray]:
    """A column of inputs, flat or nested lists, as (N, *shape) of `dtype`, and the rows that fit.

    Rows that do not fit are zero. A free axis takes the length that most rows of the batch have, which must
    then be nested.

    Raises
    ------
    InputError
        If the column holds no lists of numbers, or no row shows the length of a free axis.
    """
    array = column.combine_chunks()
    leaf = array.type
    while _is_list(leaf):
        leaf = leaf.value_type
    if not _is_list(array.type) or not _is_number(leaf):
        raise InputError(f"The column {INPUT_COLUMN!r} holds {array.type}; expected lists of numbers.", _FORMAT_HELP)
    sizes = tuple(s or 0 for s in (_commonest_shape(array, shape) if None in shape else shape))
    width = int(np.prod(sizes, dtype=np.int64))
    if not _is_list(array.type.value_type):
        lengths = pc.fill_null(pc.list_value_length(array), -1).to_numpy(zero_copy_only=False)
        good = lengths == width
        if good.all():
            flat = array.flatten().to_numpy(zero_copy_only=False)
            return np.ascontiguousarray(flat.reshape(-1, *sizes), dtype=dtype), good
    rows, good = [], np.zeros(len(array), dtype=np.bool_)
    for i, value in enumerate(array.to_pylist()):
        row = _row(value, sizes, width, dtype)
        good[i] = row is not None
        rows.append(np.zeros(sizes, dtype=dtype) if row is None else row)
    return np.ascontiguousarray(rows, dtype=dtype).reshape(-1, *sizes), good


def _row(value: Any, shape: Sequence[int], width: int, dtype: np.dtype[Any]) -> NDArray[Any] | None:
    try:
        row = np.asarray(value, dtype=dtype)
    except (ValueError, TypeError, OverflowError):
        return None
    return row.reshape(shape) if row.size == width and row.ndim else None


def _commonest_shape(array: pa.Array, shape: Sequence[int | None]) -> tuple[int, ...]:
    # The commonest, not the first: one row that a stranger made long would else be the measure of all others.
    shapes: Counter[tuple[int, ...]] = Counter()
    for value in array:
        try:
            found = np.asarray(value.as_py()).shape
        except ValueError:
            continue
        if len(found) == len(shape) and all(want in (None, have) for want, have in zip(shape, found, strict=True)):
            shapes[found] += 1
    if shapes:
        return shapes.most_common(1)[0][0]
    raise InputError(
        "The bundle's input has a free axis, and no row of `input` shows its length.",
        "Record the inputs as nested lists.",
    )


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _is_number(kind: pa.DataType) -> bool:
    # A JSON block whose lists are all empty has values of type null; its rows are judged bad, not the file.
    return bool(pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_null(kind))


def _pick(names: Iterable[str], file: str) -> tuple[str, str, bool]:
    known = list(names)
    service = [c for c in known if c in SERVICE_COLUMNS]
    reference = [c for c in known if c in VERIFICATION_COLUMNS]
    others = [known.count(c) for c in (INPUT_COLUMN, ID_COLUMN)]
    if len(service) != 1 or len(reference) > 1 or max(others) > 1 or not (reference or others[0]):
        raise InputError(f"{file} has the columns {sorted(known)[:20]}.", _FORMAT_HELP)
    # A recorded reference is what the service was judged by at the time; the input would be judged anew.
    return service[0], (reference or [INPUT_COLUMN])[0], others[1] == 1


def _batch_rows(total_bytes: int, n_rows: int, part_rows: int) -> int:
    row_bytes = max(1, total_bytes // max(1, n_rows))
    return max(1, min(MAX_BATCH_ROWS, part_rows, BATCH_BYTES // row_bytes))


def _fingerprint(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as stream:
        while block := stream.read(_HASH_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _open_parquet(path: Path, part_rows: int) -> Recording:
    try:
        with pq.ParquetFile(path) as file:
            metadata, names = file.metadata, file.schema_arrow.names
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(path, error) from None
    service, reference, ids = _pick(names, path.name)
    n_rows = metadata.num_rows
    held = sum(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))
    if n_rows != held or not 0 <= n_rows <= min(MAX_ROWS, MAX_ROWS_PER_BYTE * path.stat().st_size):
        raise InputError(
            f"The Parquet file {path.name} claims {n_rows:,} rows, its row groups {held:,}; "
            f"it has {path.stat().st_size:,} bytes.",
            f"Record it again; at most {MAX_ROWS:,} rows, and {MAX_ROWS_PER_BYTE:,} for each byte, are read.",
        )
    # Counted in decoded values: dictionary encoding can make the bytes in the file many times smaller.
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    columns = [g.column(j) for g in groups for j in range(metadata.num_columns)]
    total = 8 * sum(c.num_values for c in columns if c.path_in_schema.partition(".")[0] in (service, reference))
    parts = tuple(Part(i, s, min(part_rows, n_rows - s)) for i, s in enumerate(range(0, n_rows, part_rows)))
    rows = _batch_rows(total, n_rows, part_rows)
    return Recording(str(path), "parquet", service, reference, ids, n_rows, rows, parts, _fingerprint(path))


def _unreadable(path: str | Path, error: Exception) -> InputError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return InputError(f"{Path(path).name} is not a readable Parquet file: {reason}", "Record it again.")


def _readable_parquet(recording: Recording, first: Part, n_rows: int) -> Iterator[pa.Table]:
    try:
        yield from _read_parquet(recording, first, n_rows)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(recording.path, error) from None


def _read_parquet(recording: Recording, first: Part, n_rows: int) -> Iterator[pa.Table]:
    columns = [recording.service, recording.reference, *([ID_COLUMN] if recording.request_ids else [])]
    # A buffered stream: a row group may be far larger than memory allows to hold at once.
    with pq.ParquetFile(recording.path, buffer_size=_READ_BUFFER, pre_buffer=False) as file:
        groups: list[int] = []
        skip, before = 0, 0
        for index in range(file.metadata.num_row_groups):
            rows = file.metadata.row_group(index).num_rows
            if before + rows > first.start and before < first.start + n_rows:
                if not groups:
                    skip = first.start - before
                groups.append(index)
            before += rows
        for batch in file.iter_batches(recording.batch_rows, row_groups=groups, columns=columns, use_threads=False):
            if skip >= batch.num_rows:
                skip -= batch.num_rows
                continue
            yield pa.Table.from_batches([batch.slice(skip)])
            skip = 0


def _open_jsonl(path: Path, part_rows: int) -> Recording:
    offsets: list[int] = []
    record: dict[str, Any] = {}
    n_rows = 0
    with path.open("rb", buffering=_JSON_BLOCK) as stream:
        for offset, line in _lines(stream):
            if n_rows % part_rows == 0:
                offsets.append(offset)
            # The first line that can be read: a broken one is one bad row, wherever it is.
            record = record or _object(line)
            n_rows += 1
        size = stream.tell()
    if n_rows and not record:
        raise InputError(f"{path.name} is neither Parquet nor JSON Lines: no line is a JSON object.", _FORMAT_HELP)
    service, reference, ids = _pick(record, path.name)
    parts = tuple(
        Part(i, i * part_rows, min(part_rows, n_rows - i * part_rows), offset) for i, offset in enumerate(offsets)
    )
    rows = _batch_rows(size, n_rows, part_rows)
    return Recording(str(path), "jsonl", service, reference, ids, n_rows, rows, parts, _fingerprint(path))


def _read_jsonl(recording: Recording, first: Part, n_rows: int) -> Iterator[pa.Table]:
    with Path(recording.path).open("rb", buffering=_JSON_BLOCK) as stream:
        stream.seek(first.offset)
        lines = (_object(line) for _, line in _lines(stream))
        part_rows, done = recording.parts[0].rows, 0
        while done < n_rows:
            # Never across two parts: tables whose inputs have different depths could not be joined.
            left = min(n_rows - done, part_rows - done % part_rows)
            records = list(islice(lines, min(left, recording.batch_rows)))
            if not records:
                return
            done += len(records)
            yield _table(recording, records)


def _lines(stream: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Lines that are not empty, with their places; of one that is too long, the beginning, which is no JSON."""
    offset = stream.tell()
    while line := stream.readline(MAX_LINE_BYTES):
        rest = line
        while len(rest) == MAX_LINE_BYTES and not rest.endswith(b"\n"):
            rest = stream.readline(MAX_LINE_BYTES)
        if line.strip():
            yield offset, line
        offset = stream.tell()


def _table(recording: Recording, records: Sequence[Mapping[str, Any]]) -> pa.Table:
    columns: dict[str, pa.Array] = {}
    for name in (recording.service, recording.reference):
        values = [r.get(name) for r in records]
        inputs = name == INPUT_COLUMN
        columns[name] = _inputs(values) if inputs else pa.array(map(_numbers, values), pa.list_(pa.float32()))
    if recording.request_ids:
        ids = [r.get(ID_COLUMN) for r in records]
        # Half of a surrogate pair is text for JSON, but not for Parquet.
        texts = [str(i).encode("utf-8", "backslashreplace") if isinstance(i, str | int | float) else None for i in ids]
        columns[ID_COLUMN] = pa.array(texts, pa.binary()).cast(pa.string())
    return pa.table(columns)


def _inputs(values: Sequence[Any]) -> pa.Array:
    """Inputs as nested lists of float64, which holds every pixel and feature exactly; null where they are none."""
    arrays = []
    for value in values:
        try:
            arrays.append(np.asarray(value, dtype=np.float64))
        except (ValueError, TypeError, OverflowError):
            arrays.append(np.zeros(()))
    depths = Counter(a.ndim for a in arrays if a.ndim)
    depth = depths.most_common(1)[0][0] if depths else 1
    kind = pa.float64()
    for _ in range(depth):
        kind = pa.list_(kind)
    return pa.array([a.tolist() if a.ndim == depth else None for a in arrays], kind)


def _numbers(value: Any) -> list[float] | None:
    if not isinstance(value, list):
        return None
    try:
        return [float(v) for v in value]
    except (TypeError, ValueError, OverflowError):
        return None


def _object(line: bytes) -> dict[str, Any]:
    """A line's object; empty where it is none, so that one broken line is one bad row."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
