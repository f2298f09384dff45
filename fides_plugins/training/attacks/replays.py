"""Replays: genuine answers of the service to other inputs, from which the detector learns beside the named attacks.

They have exactly the benign marginal, so nothing in the service's answer alone gives them away, and they keep a
detector that never saw some attack from taking it for benign.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from fides_plugins.training.attacks.output import top_two
from fides_plugins.types import Float32Array, IntArray

#: A replay that keeps the class must move a probability by this much: one that hardly differs is no attack.
_LEAST_CHANGE = 0.2
#: A careful liar draws from this share of the answers that would do: those nearest in confidence.
_NEAREST = 0.1


class RankedAnswers:
    """The service's answers (N, K), their two highest classes and their order of confidence, computed once for all."""

    def __init__(self, probabilities: Float32Array) -> None:
        self.probabilities = probabilities
        _, self.own, self.second = top_two(probabilities)
        self.confidence: Float32Array = probabilities.max(axis=1)
        #: Rows rising in confidence, so that neighbours are alike.
        self.rising: IntArray = np.argsort(self.confidence, kind="stable")


@dataclass(frozen=True)
class Replay:
    """One kind of replay.

    Attributes
    ----------
    name:
        Of its pool.
    offers:
        Where a replayed answer has the class of the row that gets it: as its "own" class, as its "second", or anywhere.
    nearest:
        Whether it is about as sure as the row's own answer besides.
    """

    name: str
    offers: Literal["own", "second", "any"]
    nearest: bool = False

    @property
    def changes_label(self) -> bool:
        """Whether another class is named than the row's own."""
        return self.offers != "own"

    def apply(self, service: RankedAnswers, rng: np.random.Generator) -> tuple[Float32Array, IntArray]:
        """Replayed answers (P, K), and the rows (P,) that get them."""
        replayed = service.probabilities[self._draw(service, rng)]
        if self.changes_label:
            changed = replayed.argmax(axis=1) != service.own
        else:
            changed = np.abs(replayed - service.probabilities).max(axis=1) > _LEAST_CHANGE
        return replayed[changed], np.flatnonzero(changed)

    def _draw(self, service: RankedAnswers, rng: np.random.Generator) -> IntArray:
        """(N,) the row whose answer each row gets; any row where none offers its class."""
        chosen = rng.permutation(len(service.own))
        if self.offers == "any":
            return chosen
        offered = service.own if self.offers == "own" else service.second
        confidence, rising = service.confidence, service.rising
        for c in np.unique(service.own):
            rows, sources = np.flatnonzero(service.own == c), rising[offered[rising] == c]
            if not len(sources):
                continue
            width = max(5, round(_NEAREST * len(sources))) if self.nearest else len(sources)
            width = min(width, len(sources))
            at = np.searchsorted(confidence[sources], confidence[rows])
            first = np.clip(at - width // 2, 0, len(sources) - width)
            chosen[rows] = sources[first + rng.integers(width, size=len(rows))]
        return chosen


#: Any answer; one that has the right class as its runner-up; the careful liar's, as sure as the right answer
#: besides; and one of the same class, which changes nothing but the confidence.
REPLAYS = (
    Replay("replay", "any"),
    Replay("replay-near", "second"),
    Replay("replay-like", "second", nearest=True),
    Replay("replay-alike", "own"),
)
