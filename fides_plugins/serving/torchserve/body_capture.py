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
    request_ids: Sequence[str] = ()

    def ids(self, indices: Sequence[int]) -> list[str]:
        """Ids of some of the requests; none where the host gave none."""
        return [self.request_ids[i] for i in indices] if self.request_ids else []


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
    ids = request_ids if len(request_ids) == len(data) else ()
    unread = Pending(None, None, "no request of the batch can be read")
    requests = Requests(unread, list(rows), problems, ids)
    if rows:
        requests.pending = judge.begin(np.stack(list(rows.values())), requests.ids(requests.readable))
    return requests


def judge_bodies(judge: Judge, parser: BodyParser, requests: Requests, answer: Any) -> tuple[list[RowVerdict], Any]:
    """Verdict per request, and the answers to send (changed only where corrected)."""
    n_requests = len(requests.readable) + len(requests.problems)
    verdicts = [judge.failed(requests.problems.get(i, "")) for i in range(n_requests)]
    for index, reason in requests.problems.items():
        judge.record_unjudged(1, reason, requests.ids([index]))
    if not isinstance(answer, list) or len(answer) != n_requests:
        # TorchServe refuses such an answer itself.
        return _none_judged(judge, requests, verdicts, "the handler did not answer once per request"), answer
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
        return _none_judged(judge, requests, verdicts, error.cause_text), answer
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


def _none_judged(judge: Judge, requests: Requests, verdicts: list[RowVerdict], reason: str) -> list[RowVerdict]:
    """The same verdicts, where the requests that could be read cannot be judged after all."""
    made = judge.record_unjudged(len(requests.readable), reason, requests.ids(requests.readable))
    for index, verdict in zip(requests.readable, made, strict=True):
        verdicts[index] = verdict
    return verdicts
