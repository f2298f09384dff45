"""Judge whole bodies, for handlers that have no `inference()`: the slower, coarser way in."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fides_plugins.errors import FidesError, InputError
from fides_plugins.serving.torchserve.body import BodyParser
from fides_plugins.serving.torchserve.judge import Judge, Pending
from fides_plugins.serving.torchserve.verdicts import RowVerdict, rows_of

logger = logging.getLogger("fides_plugins")


@dataclass
class Requests:
    """Requests of a batch that could be read, and why the others could not."""

    pending: Pending
    readable: list[int]
    problems: dict[int, str]


def read_requests(judge: Judge, parser: BodyParser, data: Sequence[Any], request_ids: Sequence[str]) -> Requests:
    """Parse every request and start the verification of those that could be read."""
    rows: dict[int, NDArray[Any]] = {}
    problems: dict[int, str] = {}
    for index, item in enumerate(data):
        try:
            rows[index] = parser.request(item)
        except InputError as error:
            problems[index] = error.cause_text
    shapes = [row.shape for row in rows.values()]
    for index in list(rows):
        # A batch is one tensor: the shape that most requests have wins, the others cannot be judged with it.
        if rows[index].shape != max(set(shapes), key=shapes.count):
            problems[index] = f"the input has shape {rows[index].shape}, unlike the rest of the batch"
            del rows[index]
    if not rows:
        return Requests(Pending(None, None, "no request of the batch can be read"), [], problems)
    ids = [request_ids[i] for i in rows] if len(request_ids) == len(data) else ()
    return Requests(judge.begin(np.stack(list(rows.values())), ids), list(rows), problems)


def judge_bodies(judge: Judge, parser: BodyParser, requests: Requests, answer: Any) -> tuple[list[RowVerdict], Any]:
    """Verdict per request, and the answers to send (changed only where corrected)."""
    n_requests = len(requests.readable) + len(requests.problems)
    if requests.problems:
        judge.count_unjudged(len(requests.problems), next(iter(requests.problems.values())))
    verdicts = [judge.failed(requests.problems.get(i, "")) for i in range(n_requests)]
    if not isinstance(answer, list) or len(answer) != n_requests:
        # TorchServe refuses such an answer itself.
        return [judge.failed("the handler did not answer once per request")] * n_requests, answer
    if not requests.readable:
        return verdicts, answer
    outputs: dict[int, NDArray[Any]] = {}
    for index in requests.readable:
        try:
            outputs[index] = parser.response(answer[index]).reshape(-1)
        except InputError as error:
            verdicts[index] = judge.failed(error.cause_text)
    width = max((len(o) for o in outputs.values()), default=0)
    # Rows that could not be read are NaN: never a distribution, so policy calls them `error`.
    array = np.full((len(requests.readable), width), np.nan, dtype=np.float32)
    for position, index in enumerate(requests.readable):
        if index in outputs and len(outputs[index]) == width:
            array[position] = outputs[index]
    try:
        verdict = judge.validate_array(requests.pending, array)
    except FidesError as error:
        return [judge.failed(error.cause_text)] * n_requests, answer
    changed = list(answer)
    for position, (index, row) in enumerate(zip(requests.readable, rows_of(verdict), strict=True)):
        if index not in outputs:
            continue
        verdicts[index] = row
        if judge.settings.mode == "correct" and row.corrected and parser.replace is not None:
            values = verdict.probabilities[position]
            # What the response held is what it holds again: logits stay on a logarithmic scale.
            values = np.log(np.maximum(values, 1e-7)) if judge.output_kind == "logits" else values
            changed[index] = parser.replace(answer[index], values)
    return verdicts, changed
