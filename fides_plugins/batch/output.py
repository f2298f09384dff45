"""The output of `fides audit run`: its columns, and their summary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa

from fides_plugins.batch.records import ID_COLUMN
from fides_plugins.statistics.intervals import wilson
from fides_plugins.types import STATUS_TEXTS, BoolArray, Status, Verdict


def verdict_table(verdict: Verdict, start: int, ids: pa.ChunkedArray | None, probabilities: bool) -> pa.Table:
    """The columns of the output; docs/how-to/operations-audit.md lists them."""
    columns: dict[str, Any] = {"row": pa.array(np.arange(start, start + verdict.n_rows, dtype=np.int64))}
    if ids is not None:
        columns[ID_COLUMN] = ids
    columns |= {
        "status": _texts(verdict.status, STATUS_TEXTS),
        "score": pa.array(verdict.score, from_pandas=True),
        "p_value": pa.array(verdict.p_value, from_pandas=True),
        "service_label": pa.array(verdict.service_label),
        "verified_label": pa.array(verdict.verified_label),
        "label": pa.array(verdict.label),
        "corrected": pa.array(verdict.corrected),
        "refused": pa.array(verdict.refused),
        "reason": _texts(verdict.reason_codes, verdict.reasons),
    }
    if probabilities:
        flat = pa.array(verdict.probabilities.ravel())
        columns["probabilities"] = pa.FixedSizeListArray.from_arrays(flat, verdict.probabilities.shape[1])
    return pa.table(columns)


def _texts(codes: Any, texts: Sequence[str]) -> pa.Array:
    indices = pa.array(np.asarray(codes, dtype=np.int32))
    return pa.DictionaryArray.from_arrays(indices, pa.array(list(texts) or [""], pa.string())).cast(pa.string())


def with_faults(verdict: Verdict, faults: Mapping[str, BoolArray]) -> Verdict:
    """The verdict, with what is wrong with the recording as the reason of rows that could not be judged.

    The pipeline sees such rows as NaN; only their reader knows that they were too short, or logits.
    """
    unjudged = np.isin(verdict.status, (Status.ERROR, Status.INDETERMINATE))
    codes, reasons = np.array(verdict.reason_codes), list(verdict.reasons)
    for text, rows in faults.items():
        if (rows & unjudged).any():
            codes[rows & unjudged] = len(reasons)
            reasons.append(text)
    return replace(verdict, reason_codes=codes, reasons=tuple(reasons))


class Summary:
    """Counts over batches of the output."""

    def __init__(self) -> None:
        self._counts: dict[str, dict[str, int]] = {"status": {}, "reason": {}}
        self._sums = {"rows": 0, "disagreements": 0, "corrected": 0, "refused": 0}

    def add(self, table: pa.Table) -> None:
        """Add a batch."""
        for name, counts in self._counts.items():
            for item in table.column(name).value_counts().to_pylist():
                counts[item["values"]] = counts.get(item["values"], 0) + item["counts"]
        service = table.column("service_label").to_numpy()
        verified = table.column("verified_label").to_numpy()
        self._sums["rows"] += table.num_rows
        self._sums["disagreements"] += int(((service != verified) & (service >= 0) & (verified >= 0)).sum())
        for name in ("corrected", "refused"):
            self._sums[name] += int(table.column(name).to_numpy(zero_copy_only=False).sum())

    def result(self, false_alarm_rate: float) -> dict[str, Any]:
        """The summary as JSON."""
        statuses = {s: self._counts["status"].get(s, 0) for s in STATUS_TEXTS}
        rows = self._sums["rows"]
        judged = statuses["trusted"] + statuses["attacked"]
        low, high = wilson(statuses["attacked"], judged)
        unjudged = rows - judged
        reasons = sorted(((n, r) for r, n in self._counts["reason"].items() if r), reverse=True)
        return {
            **self._sums,
            "rows": rows,
            "statuses": statuses,
            "false_alarm_rate": false_alarm_rate,
            "judged": judged,
            "unjudged": unjudged,
            "unjudged_share": unjudged / rows,
            # Unknown, not zero, where nothing could be judged.
            "attacked_share": statuses["attacked"] / judged if judged else None,
            "attacked_interval": [low, high],
            "more_than_false_alarms": low > false_alarm_rate if judged else None,
            "reasons": {reason: count for count, reason in reasons[:20]},
        }
