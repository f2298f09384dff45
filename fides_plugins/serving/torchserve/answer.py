"""Which class a final body names, so that what a handler does after `inference()` can be checked as well.

Read without being told: a number (the index of a class), the name of a class, a mapping or list of names and scores,
and a distribution over all classes; for each row, inside the lists of TorchServe's envelopes too. Anything else needs a
path.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from math import isnan
from numbers import Real
from typing import Any

from fides_plugins.serving.torchserve.options import AnswerFormat

_LONGEST_NAME = 4096

#: The labels that an answer may stand for: several where scores tie, or where a number is a name as well.
Labels = frozenset[int]


class AnswerReader:
    """Reads the classes that bodies name.

    Parameters
    ----------
    declared:
        The section `answer`.
    class_names:
        The bundle's names, by label.

    Attributes
    ----------
    required:
        Whether a class has to be readable, because somebody said where it is.
    """

    def __init__(self, declared: AnswerFormat, class_names: Sequence[str]) -> None:
        names = declared.names or tuple(class_names)
        self.required = bool(declared.path or declared.names)
        self._enabled = declared.compare and bool(names)
        self._path = [part for part in declared.path.split(".") if part]
        self._n_classes = len(class_names)
        self._labels: dict[str, set[int]] = {}
        for label, name in enumerate(names):
            self._labels.setdefault(name.strip(), set()).add(label)

    def agrees(self, body: Any, labels: Sequence[int]) -> bool | None:
        """Whether a body names the judged labels of its rows; None where that cannot be told.

        One answer for several rows is compared where all of them have the same label: a mean of crops or passes has
        it too.
        """
        if not self._enabled or not labels or min(labels) < 0:
            return None
        answers = self._answers(body, len(labels))
        if answers is not None and len(answers) == 1 and len(set(labels)) == 1:
            answers *= len(labels)
        if answers is None or len(answers) != len(labels):
            return None
        return all(label in answer for label, answer in zip(labels, answers, strict=True))

    def _answers(self, body: Any, n_rows: int) -> list[Labels] | None:
        value = _plain(body)
        if self._path:
            value = _follow(value, self._path)
        candidates = [[value], *_lists(value)]
        for wanted in (n_rows, 1):
            for items in candidates:
                read = [self._read(item) for item in items] if len(items) == wanted else []
                if read and None not in read:
                    return [r for r in read if r is not None]
        return None

    def _read(self, value: Any) -> Labels | None:
        """The labels that one answer may stand for."""
        value = _plain(value)
        named = self._named(value)
        if named is not None:
            return named
        if isinstance(value, Mapping):
            return self._top([(self._named(name), score) for name, score in value.items()])
        if not isinstance(value, list) or not value:
            return None
        if len(value) == self._n_classes > 1 and all(isinstance(v, float) for v in value):
            best = max(value)
            return (
                frozenset(i for i, score in enumerate(value) if score == best) if not any(map(isnan, value)) else None
            )
        ranked = [self._named(v) if isinstance(v, str) else None for v in value]
        if len(ranked) > 1 and None not in ranked:
            return ranked[0]
        return self._top([self._scored(item) for item in value])

    def _named(self, value: Any) -> Labels | None:
        """An index or a name; a number that a class has for its name may be meant either way."""
        found = set(self._labels.get(str(value).strip(), ())) if _is_index(value) or isinstance(value, str) else set()
        text = value.strip() if isinstance(value, str) else ""
        if _is_index(value) or (text.isascii() and text.isdigit() and len(text) < 10):
            index = int(value)
            found |= {index} if 0 <= index < self._n_classes else set()
        return frozenset(found) or None

    def _scored(self, item: Any) -> tuple[Labels | None, Any]:
        """A name and a score in a pair or a small mapping, such as ["cat", 0.9] or {"label": "cat", "score": 0.9}."""
        parts = list(item.values()) if isinstance(item, Mapping) else item if isinstance(item, (list, tuple)) else []
        names = [n for p in parts if isinstance(p, str) and (n := self._named(p)) is not None]
        scores = [p for p in parts if isinstance(p, float)]
        return (names[0], scores[0]) if len(names) == len(scores) == 1 else (None, None)

    def _top(self, scored: Sequence[tuple[Labels | None, Any]]) -> Labels | None:
        """The labels with the highest score; None where one part is no name, or no number."""
        if not scored or any(n is None or isinstance(s, bool) or not isinstance(s, Real) or s != s for n, s in scored):
            return None
        best = max(score for _, score in scored)
        return frozenset(label for labels, score in scored if score == best for label in labels or ())


def _is_index(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _plain(value: Any) -> Any:
    """A body as JSON would hold it: text parsed where it is JSON, tensors and arrays as lists and numbers."""
    if hasattr(value, "detach") or hasattr(value, "tolist"):
        value = value.detach().cpu().tolist() if hasattr(value, "detach") else value.tolist()
    if isinstance(value, (str, bytes, bytearray)):
        try:
            is_json = value.lstrip()[:1] in ("{", "[", '"', b"{", b"[", b'"')
            # Bodies are images too; a name is short.
            text = value[: None if is_json else _LONGEST_NAME]
            text = text if isinstance(text, str) else bytes(text).decode("utf-8", "replace")
            return json.loads(text) if is_json else text
        except (ValueError, RecursionError):
            return None
    return list(value) if isinstance(value, tuple) else value


def _follow(value: Any, path: Sequence[str]) -> Any:
    """What lies at a path, or None; a name steps into each item of a list, a number into one of them."""
    for position, part in enumerate(path):
        if isinstance(value, list):
            if not part.isdigit():
                return [_follow(item, path[position:]) for item in value]
            value = value[int(part)] if int(part) < len(value) else None
        else:
            value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _lists(value: Any) -> list[list[Any]]:
    """The lists in which a body may hold an answer for each row: its own, or those of TorchServe's envelopes."""
    if isinstance(value, Mapping):
        outputs = value.get("outputs")
        if isinstance(outputs, list) and all(isinstance(o, Mapping) for o in outputs):
            data = [o.get("data") for o in outputs]
            each = [d[0] if isinstance(d, list) and len(d) == 1 else d for d in data]
            return [each, *(d for d in data[:1] if isinstance(d, list) and len(data) == 1)]
        value = value.get("predictions")
    return [value] if isinstance(value, list) else []
