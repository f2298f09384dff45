"""Replays: genuine answers of the service to other inputs, from which the detector learns beside the named attacks.

They have exactly the benign marginal, so nothing in the service's answer alone gives them away, and they keep a
detector that never saw some attack from taking it for benign.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fides_plugins.types import Float32Array, IntArray

#: A replay that keeps the class must move a probability by this much: one that hardly differs is no attack.
_LEAST_CHANGE = 0.2
#: A careful liar's answer is drawn from so many of those nearest in confidence, as a share of all that would do.
_NEAREST = 0.1

#: From (N, K) answers and a generator to the row whose answer each row gets, (N,).
_Draw = Callable[[Float32Array, np.random.Generator], IntArray]


@dataclass(frozen=True)
class Replay:
    """One kind.

    Attributes
    ----------
    name:
        Of its pool.
    changes_label:
        Whether another class is named than the row's own.
    """

    name: str
    changes_label: bool
    draw: _Draw

    def apply(self, service: Float32Array, rng: np.random.Generator) -> tuple[Float32Array, IntArray]:
        """Replayed answers (P, K), and the rows (P,) of `service` (N, K) that get them."""
        replayed = service[self.draw(service, rng)]
        if self.changes_label:
            changed = replayed.argmax(axis=1) != service.argmax(axis=1)
        else:
            changed = np.abs(replayed - service).max(axis=1) > _LEAST_CHANGE
        return replayed[changed], np.flatnonzero(changed)


def _any(service: Float32Array, rng: np.random.Generator) -> IntArray:
    return np.asarray(rng.permutation(len(service)))


def _runner_up(service: Float32Array, rng: np.random.Generator) -> IntArray:
    order = np.argsort(-service, axis=1)
    return _by_class(service, order[:, 0], order[:, 1], rng, nearest=False)


def _runner_up_as_sure(service: Float32Array, rng: np.random.Generator) -> IntArray:
    order = np.argsort(-service, axis=1)
    return _by_class(service, order[:, 0], order[:, 1], rng, nearest=True)


def _same_class(service: Float32Array, rng: np.random.Generator) -> IntArray:
    own = service.argmax(axis=1)
    return _by_class(service, own, own, rng, nearest=False)


def _by_class(
    service: Float32Array, wanted: IntArray, offered: IntArray, rng: np.random.Generator, nearest: bool
) -> IntArray:
    """For each row, one that offers the class it wants; any row where none does."""
    chosen = np.asarray(rng.permutation(len(service)))
    confidence = service.max(axis=1)
    # Rising in confidence, so that neighbours are alike.
    rising = np.argsort(confidence, kind="stable")
    for c in np.unique(wanted):
        rows, sources = np.flatnonzero(wanted == c), rising[offered[rising] == c]
        if not len(sources):
            continue
        width = max(5, round(_NEAREST * len(sources))) if nearest else len(sources)
        width = min(width, len(sources))
        at = np.searchsorted(confidence[sources], confidence[rows])
        first = np.clip(at - width // 2, 0, len(sources) - width)
        chosen[rows] = sources[first + rng.integers(width, size=len(rows))]
    return chosen


#: Any answer; one that has the right class as its runner-up; the careful liar's, as sure as the right answer
#: besides; and one of the same class, which changes nothing but the confidence.
REPLAYS = (
    Replay("replay", True, _any),
    Replay("replay-near", True, _runner_up),
    Replay("replay-like", True, _runner_up_as_sure),
    Replay("replay-alike", False, _same_class),
)
