"""Judge whole bodies, for handlers that have no `inference()`: the slower, coarser way in."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fides_plugins.errors import InputError
from fides_plugins.serving.http import RowVerdict, rows_of
from fides_plugins.serving.torchserve.body import BodyParser
from fides_plugins.serving.torchserve.judge import InferenceJudge
from fides_plugins.types import Status

logger = logging.getLogger("fides_plugins")


class Bodies:
    """The request bodies of a batch. Making one starts the verification of those that can be read.

    Parameters
    ----------
    data:
        The batch as TorchServe hands it over.
    request_ids:
        One per item of `data`; ignored where there are more or fewer.
    exempt:
        Requests that asked for something else than a class output, and why. Any client may, by a header, whether the
        handler knows such a thing or not: an answer that holds a class output all the same is judged, alone.
    """

    def __init__(
        self,
        judge: InferenceJudge,
        parser: BodyParser,
        data: Sequence[Any],
        request_ids: Sequence[str] = (),
        exempt: Mapping[int, str] | None = None,
    ) -> None:
        self._judge, self._parser = judge, parser
        self._request_ids = request_ids if len(request_ids) == len(data) else ()
        self._exempt = exempt or {}
        self._unread = dict(self._exempt)
        self._alone = {i: Bodies(judge, parser, [data[i]], self._ids([i])) for i in self._exempt}
        rows: dict[int, NDArray[Any]] = {}
        for index, item in enumerate(data):
            if index not in self._exempt:
                try:
                    rows[index] = parser.request(item)
                except InputError as error:
                    self._unread[index] = error.cause_text
        shapes = [row.shape for row in rows.values()]
        for index in list(rows):
            # A batch is one tensor: the shape that most requests have wins, the others cannot be judged with it.
            if rows[index].shape != max(set(shapes), key=shapes.count):
                self._unread[index] = f"the input has shape {rows[index].shape}, unlike the rest of the batch"
                del rows[index]
        self._read = list(rows)
        if rows:
            self._pending = judge.begin(np.stack(list(rows.values())), self._ids(rows))

    def judge(self, answer: Any) -> tuple[list[RowVerdict], Any]:
        """Verdict per request, and the answers to send (changed only where corrected)."""
        verdicts: dict[int, RowVerdict] = {}
        n_requests = len(self._read) + len(self._unread)
        whole = isinstance(answer, list) and len(answer) == n_requests
        for index, reason in self._unread.items():
            alone = self._alone.get(index)
            if whole and alone is not None and alone.holds_class_output(answer[index]):
                (verdict,), (changed,) = alone.judge([answer[index]])
                attacked = verdict.status is Status.ATTACKED
                answer = [changed if i == index else item for i, item in enumerate(answer)]
                verdicts[index] = verdict if attacked else RowVerdict(Status.INDETERMINATE, reason=reason)
            else:
                (verdicts[index],) = self._judge.unjudged(1, reason, self._ids([index]), exempt=alone is not None)
        if not whole:
            # TorchServe refuses such an answer itself.
            reason = "the handler did not answer once per request"
            rows = self._judge.unjudged(len(self._read), reason, self._ids(self._read))
            verdicts |= dict(zip(self._read, rows, strict=True))
        elif self._read:
            answer = self._judge_read(answer, verdicts)
        return [verdicts[i] for i in range(n_requests)], answer

    def holds_class_output(self, item: Any) -> bool:
        """Whether the one request could be read, and its answer too."""
        try:
            return bool(self._read) and self._parser.response(item).size > 0
        except InputError:
            return False

    def _judge_read(self, answer: list[Any], verdicts: dict[int, RowVerdict]) -> list[Any]:
        """Add the verdicts on the requests that could be read; the answers to send."""
        outputs: dict[int, NDArray[Any]] = {}
        for index in self._read:
            try:
                outputs[index] = self._parser.response(answer[index]).reshape(-1)
            except InputError as error:
                verdicts[index] = self._judge.failed(error.cause_text)
        width = max((len(o) for o in outputs.values()), default=0)
        # Rows that could not be read are NaN: never a distribution, so policy calls them `error`.
        array = np.full((len(self._read), width), np.nan, dtype=np.float32)
        for position, index in enumerate(self._read):
            if index in outputs and len(outputs[index]) == width:
                array[position] = outputs[index]
        protection = self._judge.protection
        written, verdict = protection.correct(array, self._judge.judge_array(self._pending, array))
        changed = list(answer)
        for position, (index, row) in enumerate(zip(self._read, rows_of(verdict), strict=True)):
            if index not in outputs:
                continue
            verdicts[index] = row
            if row.corrected and written is not array and self._parser.replace is not None:
                try:
                    changed[index] = self._parser.replace(answer[index], written[position])
                except Exception:  # host boundary: a foreign parser; the row is attacked and uncorrected
                    logger.exception("a correction cannot be written into a body")
                    (verdicts[index],) = rows_of(protection.uncorrected(verdict.rows(slice(position, position + 1))))
        return changed

    def _ids(self, indices: Iterable[int]) -> list[str]:
        """Ids of some of the requests; none where the host gave none."""
        return [self._request_ids[i] for i in indices] if self._request_ids else []
