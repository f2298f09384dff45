"""Body-level capture, for handlers that have no `inference()`: the slower, coarser way in.

A parser says, for one request, where the input is in the body and where the class output is in the
response. It is declared, never guessed: either two dotted JSON paths, or a module in the archive with
functions `request(item)`, `response(answer)` and, for the mode `correct`, `replace(answer, probabilities)`.
"""

from __future__ import annotations

import importlib
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fides_plugins.errors import InputError, SettingsError
from fides_plugins.serving.http import RowVerdict, rows_of
from fides_plugins.serving.torchserve.judge import InferenceJudge
from fides_plugins.serving.torchserve.options import BodyFormat
from fides_plugins.serving.torchserve.tensors import to_numpy

logger = logging.getLogger("fides_plugins")


@dataclass(frozen=True)
class BodyParser:
    """What is needed to judge bodies. The two readers raise `InputError` for anything that cannot be read.

    Attributes
    ----------
    request:
        One item of a batch, as TorchServe hands it over, to the input of one row (no batch axis).
    response:
        One answer of the handler to its class output (K,).
    replace:
        The answer with other class values (K,); None where a correction cannot be written back.
    """

    request: Callable[[Any], NDArray[Any]]
    response: Callable[[Any], NDArray[Any]]
    replace: Callable[[Any, NDArray[Any]], Any] | None


def _reader(parse: Callable[[Any], Any], what: str) -> Callable[[Any], NDArray[Any]]:
    def read(value: Any) -> NDArray[Any]:
        try:
            return to_numpy(parse(value))
        except InputError:
            raise
        except Exception as error:  # a client's body or a foreign parser may fail in any way; the row is marked
            raise InputError(f"The {what} body cannot be read: {type(error).__name__}.") from error

    return read


def make_parser(declared: BodyFormat | str) -> BodyParser:
    """The parser that the section `fides:` declares.

    Raises
    ------
    SettingsError
        If the named module cannot be imported or lacks a function.
    """
    if isinstance(declared, BodyFormat):
        return _json_parser(declared)
    name = declared[:-3] if declared.endswith(".py") else declared
    try:
        module = importlib.import_module(name)
    except Exception as error:  # foreign code may raise anything at import; told in one line
        raise SettingsError(
            f"The parser {declared!r} cannot be imported: {type(error).__name__}: {error}.",
            "Put it into the archive with --extra-files.",
        ) from error
    missing = [f for f in ("request", "response") if not callable(getattr(module, f, None))]
    if missing:
        raise SettingsError(f"The parser {declared!r} has no function {' or '.join(missing)}.")
    return BodyParser(
        _reader(module.request, "request"), _reader(module.response, "response"), getattr(module, "replace", None)
    )


def _json_parser(paths: BodyFormat) -> BodyParser:
    def request(item: Any) -> Any:
        body = item.get("data", item.get("body")) if isinstance(item, Mapping) else item
        # Rows are numbers; the bundle's models take float32.
        return np.asarray(_follow(_decoded(body), paths.request), dtype=np.float32)

    def response(answer: Any) -> Any:
        return _follow(_decoded(answer), paths.response)

    def replace(answer: Any, probabilities: NDArray[Any]) -> Any:
        was_text = isinstance(answer, (str, bytes, bytearray))
        content = _replaced(_decoded(answer), _parts(paths.response), probabilities)
        return json.dumps(content) if was_text else content

    return BodyParser(_reader(request, "request"), _reader(response, "response"), replace)


def _decoded(body: Any) -> Any:
    return json.loads(body) if isinstance(body, (str, bytes, bytearray)) else body


def _parts(path: str) -> list[str]:
    return [p for p in path.split(".") if p]


def _follow(value: Any, path: str) -> Any:
    for part in _parts(path):
        value = value[int(part)] if isinstance(value, (list, tuple)) else value[part]
    return list(value.values()) if isinstance(value, Mapping) else value


def _replaced(value: Any, parts: list[str], new: NDArray[Any]) -> Any:
    """A copy of `value` with the class output at `parts` exchanged; everything else is the same object."""
    if not parts:
        numbers = [float(v) for v in new]
        # A mapping of class name to probability keeps its names and their order.
        return dict(zip(value, numbers, strict=True)) if isinstance(value, Mapping) else numbers
    head, rest = parts[0], parts[1:]
    if isinstance(value, (list, tuple)):
        return [_replaced(v, rest, new) if i == int(head) else v for i, v in enumerate(value)]
    return {k: _replaced(v, rest, new) if k == head else v for k, v in value.items()}


class Bodies:
    """The request bodies of a batch. Making one starts the verification of those that can be read.

    Parameters
    ----------
    data:
        The batch as TorchServe hands it over.
    request_ids:
        One per item of `data`; ignored where there are more or fewer.
    exempt:
        Requests whose answer is no class output, and why. They are not read.
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
        for index, reason in self._unread.items():
            (verdicts[index],) = self._judge.unjudged(1, reason, self._ids([index]), exempt=index in self._exempt)
        n_requests = len(self._read) + len(self._unread)
        if not isinstance(answer, list) or len(answer) != n_requests:
            # TorchServe refuses such an answer itself.
            reason = "the handler did not answer once per request"
            rows = self._judge.unjudged(len(self._read), reason, self._ids(self._read))
            verdicts |= dict(zip(self._read, rows, strict=True))
        elif self._read:
            answer = self._judge_read(answer, verdicts)
        return [verdicts[i] for i in range(n_requests)], answer

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
