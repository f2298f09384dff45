"""Replays: genuine answers of the service to other inputs, from which the detector learns beside the named attacks.

They have exactly the benign marginal, so nothing in the service's answer alone gives them away, and they keep a
detector that never saw some attack from taking it for benign.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np

from fides_plugins.types import Float32Array, IntArray

#: A replay that keeps the class must move a probability by this much: one that hardly differs is no attack.
_LEAST_CHANGE = 0.2
#: A careful liar draws from this share of the answers that would do: those nearest in confidence.
_NEAREST = 0.1


class RankedAnswers:
    """The service's answers (N, K) and their order of confidence, computed once for all draws."""

    def __init__(self, probabilities: Float32Array) -> None:
        self.probabilities = probabilities
        self.own: IntArray = probabilities.argmax(axis=1)
        self.confidence: Float32Array = probabilities.max(axis=1)
        #: Rows rising in confidence, so that neighbours are alike.
        self.rising: IntArray = np.argsort(self.confidence, kind="stable")

    @cached_property
    def first_two(self) -> IntArray:
        """(N, 2): class and runner-up."""
        return np.asarray(np.argsort(-self.probabilities, axis=1)[:, :2])


#: From answers and a generator to the row whose answer each row gets, (N,).
_Draw = Callable[[RankedAnswers, np.random.Generator], IntArray]


@dataclass(frozen=True)
class Replay:
    """One kind of replay.

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

    def apply(self, service: RankedAnswers, rng: np.random.Generator) -> tuple[Float32Array, IntArray]:
        """Replayed answers (P, K), and the rows (P,) that get them."""
        replayed = service.probabilities[self.draw(service, rng)]
        if self.changes_label:
            changed = replayed.argmax(axis=1) != service.own
        else:
            changed = np.abs(replayed - service.probabilities).max(axis=1) > _LEAST_CHANGE
        return replayed[changed], np.flatnonzero(changed)


def _any(service: RankedAnswers, rng: np.random.Generator) -> IntArray:
    return np.asarray(rng.permutation(len(service.own)))


def _runner_up(service: RankedAnswers, rng: np.random.Generator, nearest: bool) -> IntArray:
    own, second = service.first_two.T
    return _by_class(service, own, second, rng, nearest)


def _same_class(service: RankedAnswers, rng: np.random.Generator) -> IntArray:
    return _by_class(service, service.own, service.own, rng, nearest=False)


def _by_class(
    service: RankedAnswers, wanted: IntArray, offered: IntArray, rng: np.random.Generator, nearest: bool
) -> IntArray:
    """For each row, one that offers the class it wants; any row where none does."""
    chosen = _any(service, rng)
    confidence, rising = service.confidence, service.rising
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
    Replay("replay-near", True, partial(_runner_up, nearest=False)),
    Replay("replay-like", True, partial(_runner_up, nearest=True)),
    Replay("replay-alike", False, _same_class),
)
