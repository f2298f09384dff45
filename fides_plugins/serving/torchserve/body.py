"""Body-level capture: read the input and the class output of a handler that has no `inference()`.

A parser says, for one request, where the input is in the body and where the class output is in the
response. It is declared, never guessed: either two dotted JSON paths, or a module in the archive with
functions `request(item)`, `response(answer)` and, for the mode `correct`, `replace(answer, probabilities)`.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fides_plugins.errors import InputError, SettingsError
from fides_plugins.serving.torchserve.options import BodyFormat
from fides_plugins.serving.torchserve.tensors import to_numpy


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
