"""Judge whole bodies, for handlers that have no `inference()`: the slower, coarser way in."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fides_plugins.errors import InputError
from fides_plugins.serving.http import RowVerdict, rows_of
from fides_plugins.serving.torchserve.body import BodyParser
from fides_plugins.serving.torchserve.judge import InferenceJudge, PendingCall

logger = logging.getLogger("fides_plugins")


@dataclass(frozen=True)
class Requests:
    """Requests of a batch that could be read, and why the others could not."""

    pending: PendingCall
    readable: list[int]
    problems: dict[int, str]
    request_ids: Sequence[str] = ()

    def ids(self, indices: Sequence[int]) -> list[str]:
        """Ids of some of the requests; none where the host gave none."""
        return [self.request_ids[i] for i in indices] if self.request_ids else []


def read_requests(
    judge: InferenceJudge, parser: BodyParser, data: Sequence[Any], request_ids: Sequence[str]
) -> Requests:
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
    if not rows:
        return Requests(PendingCall(problem="no request of the batch can be read"), [], problems, ids)
    kept = [ids[i] for i in rows] if ids else []
    return Requests(judge.begin(np.stack(list(rows.values())), kept), list(rows), problems, ids)


def judge_bodies(
    judge: InferenceJudge, parser: BodyParser, requests: Requests, answer: Any
) -> tuple[list[RowVerdict], Any]:
    """Verdict per request, and the answers to send (changed only where corrected)."""
    n_requests = len(requests.readable) + len(requests.problems)
    verdicts = [judge.failed(requests.problems.get(i, "")) for i in range(n_requests)]
    for index, reason in requests.problems.items():
        judge.unjudged(1, reason, requests.ids([index]))
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
    verdict = judge.judge_array(requests.pending, array)
    written, verdict = judge.protection.correct(array, verdict)
    changed = list(answer)
    for position, (index, row) in enumerate(zip(requests.readable, rows_of(verdict), strict=True)):
        if index not in outputs:
            continue
        verdicts[index] = row
        if row.corrected and written is not array and parser.replace is not None:
            try:
                changed[index] = parser.replace(answer[index], written[position])
            except Exception:  # host boundary: a foreign parser; the row is attacked and uncorrected
                logger.exception("a correction cannot be written into a body")
                (verdicts[index],) = rows_of(judge.protection.uncorrected(verdict.rows(slice(position, position + 1))))
    return verdicts, changed


def _none_judged(
    judge: InferenceJudge, requests: Requests, verdicts: list[RowVerdict], reason: str
) -> list[RowVerdict]:
    """The same verdicts, where the requests that could be read cannot be judged after all."""
    made = judge.unjudged(len(requests.readable), reason, requests.ids(requests.readable))
    for index, verdict in zip(requests.readable, made, strict=True):
        verdicts[index] = verdict
    return verdicts
