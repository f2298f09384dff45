"""Recorded predictions for the tests of `fides audit run`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from fides_plugins.testing import fake_logits, fake_service, switch_top_two
from fides_plugins.types import softmax

#: Columns enough for a verdict.
PAIRS = ("request_id", "service_probabilities", "verification_probabilities")


def recorded(n: int, share: float = 0.05, n_classes: int = 10, seed: int = 0) -> dict[str, NDArray[Any]]:
    """Columns of n rows of which `share` are attacked: both distributions, logits, inputs, ids, the truth."""
    logits = fake_logits(n, n_classes, seed=seed)
    service = fake_service(logits, seed=seed + 1).probabilities
    attacked = np.random.default_rng(seed + 2).random(n) < share
    lie = switch_top_two(service, np.flatnonzero(attacked))
    return {
        "request_id": np.array([f"request-{i}" for i in range(n)], dtype=object),
        "service_probabilities": lie,
        "service_logits": np.log(np.maximum(lie, 1e-9)),
        "verification_probabilities": softmax(logits),
        "verification_logits": logits,
        "input": logits,
        "attacked": attacked,
    }


def table(columns: dict[str, NDArray[Any]], *names: str) -> pa.Table:
    """Some of the columns as an Arrow table; matrices become lists."""
    made = {}
    for name in names:
        array = columns[name]
        if array.ndim == 2:
            offsets = np.arange(0, array.size + 1, array.shape[1], dtype=np.int32)
            made[name] = pa.ListArray.from_arrays(pa.array(offsets), pa.array(array.ravel()))
        else:
            made[name] = pa.array(array)
    return pa.table(made)


def write_parquet(path: Path, columns: dict[str, NDArray[Any]], *names: str, row_group_size: int = 1 << 20) -> Path:
    """The named columns as Parquet."""
    pq.write_table(table(columns, *names), path, row_group_size=row_group_size)
    return path


def write_jsonl(path: Path, columns: dict[str, NDArray[Any]], *names: str) -> Path:
    """The named columns as JSON Lines."""
    with path.open("w") as stream:
        for i in range(len(columns[names[0]])):
            row = {n: columns[n][i].tolist() if columns[n].ndim == 2 else columns[n][i] for n in names}
            stream.write(json.dumps(row) + "\n")
    return path
