"""How many rows a request may have made, as its body tells: the forms in which clients send several rows at once.

A client writes its body, so a body is never believed alone. Each request offers the numbers that it can be read to
have; they count only where one choice among all requests of the batch gives the number of rows that `inference()` got.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def row_counts(item: Any, items: int | None = None) -> frozenset[int]:
    """The numbers of rows that one item of a batch may have made.

    `items`: how many items a service envelope took out of it, where one did. One row is always possible otherwise.
    """
    body = item.get("data") or item.get("body") if isinstance(item, Mapping) else item
    if isinstance(body, (str, bytes, bytearray)):
        try:
            # Images are bytes too; nothing that is no JSON object or list is worth a parser's time.
            body = json.loads(body) if body.lstrip()[:1] in ("{", "[", b"{", b"[") else None
        except (ValueError, RecursionError):
            body = None
    if items is not None:
        instances = body.get("instances") if isinstance(body, Mapping) else None
        return frozenset({items} | (_of_list(instances) if isinstance(instances, list) else set()))
    counts = {1}
    if isinstance(body, list):
        counts |= _of_list(body)
    elif isinstance(body, Mapping):
        for key, value in body.items():
            # `instances` of KServe v1 and of TorchServe's envelope `json`, `inputs` of KServe v2, or a list of lists.
            if isinstance(value, list) and (key in ("instances", "inputs") or any(isinstance(v, list) for v in value)):
                counts |= _of_list(value)
        counts |= _kserve_v2(body.get("inputs"))
    return frozenset(counts)


def _of_list(items: list[Any]) -> set[int]:
    """A row for each item; or none for those that are empty, or several for those that are lists of lists."""
    nested = [len(i) if isinstance(i, list) and any(isinstance(v, list) for v in i) else 1 for i in items]
    return {len(items), sum(i not in ([], {}, "") for i in items), sum(nested)}


def _kserve_v2(inputs: Any) -> set[int]:
    """Rows by the first axes of KServe v2's input tensors: of one of several inputs of a row, or of all together."""
    if not isinstance(inputs, list) or not all(isinstance(i, Mapping) for i in inputs):
        return set()
    shapes = [i.get("shape") for i in inputs]
    first = [s[0] for s in shapes if isinstance(s, list) and s and isinstance(s[0], int) and s[0] > 0]
    return {sum(first), *first} if first else set()
