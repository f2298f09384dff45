"""Rows whose two models agree and rows whose models don't, put into one order. Part of the detector's graph.

A changed class shows as disagreement, a changed confidence does not. One score for both has to trade them
against each other everywhere: what lifts tampered agreeing rows above the few most suspicious benign ones also
lifts them above the many disagreeing ones, and then a plain "do they disagree?" is the better detector. So each
stratum has scores of its own, is measured in its own false alarms, and gets a share of the budget: a row's rank is
-ln of the budget at which its stratum's share reaches it (weighted Bonferroni; Holm, "A Simple Sequentially
Rejective Multiple Test Procedure", 1979).

Within a stratum, what training learned does not decide alone. It knows the attacks that it saw; an attack that it
did not see is no less unlike a benign row for that, and plain KL tells so. The two are averaged as ranks, which is
the weighted geometric mean of their budgets (a logarithmic opinion pool; Genest and Zidek, "Combining Probability
Distributions: A Critique and an Annotated Bibliography", 1986).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from fides_plugins.types import BoolArray, Float64Array, IntArray

#: Bends of a stratum's curve: the benign rows at rank 2, 4, 8, ... This many hold 2**15 rows.
KNOTS = 16
#: Slopes outside the range of benign scores, where there is nothing to measure; (below, above).
_OUTER = ((0.05, 1.0), (0.1, 2.0))
#: Slope of a stratum with too few benign rows for a curve.
_FLAT = 0.25
#: Slope by which mean levels may be stretched.
_STRAIGHT = (0.5, 3.0)
#: At the beginning of training.
FIRST_SHARE = 0.1
#: Weights of the scores where the models disagree (the logit, KL of the answers as they came, KL after temperature
#: scaling), and where they agree (the logit, KL after temperature scaling). Each adds up to 1. Between 0.4 and 0.65 for
#: the logit little changes; see docs/explanation/detection.md.
ScoreWeights = tuple[tuple[float, float, float], tuple[float, float]]
SCORE_WEIGHTS: ScoreWeights = ((0.6, 0.25, 0.15), (0.5, 0.5))
LEARNED_ALONE: ScoreWeights = ((1.0, 0.0, 0.0), (1.0, 0.0))
#: Which columns of the scores those are.
_COLUMNS = ((0, 2, 3), (1, 3))


class Strata(nn.Module):
    """(N, 4) scores to (N,) ranks.

    The scores: the logit as if the models disagreed, as if they agreed, KL of the answers as they came, KL after
    temperature scaling.
    Each stratum has a curve for every score that has a weight there; the others' knots and bends are zero.
    """

    knots: Tensor
    bends: Tensor
    slope: Tensor
    base: Tensor
    share: Tensor

    def __init__(self) -> None:
        super().__init__()
        # One column of knots per score: the curve of the disagreeing rows, then of the agreeing ones.
        self.register_buffer("knots", torch.zeros(4, 2, KNOTS))
        self.register_buffer("bends", torch.zeros(4, 2, KNOTS, 2))
        self.register_buffer("slope", torch.eye(4, 2))
        self.register_buffer("base", torch.zeros(2))
        self.register_buffer("share", torch.zeros(2))
        self.allocate(FIRST_SHARE)

    def forward(self, scores: Tensor, agrees: Tensor) -> Tensor:
        """-ln of the budget that reaches a row.

        Parameters
        ----------
        scores:
            (N, 4).
        agrees:
            (N, 1) bool: whether the models agree.
        """
        risen = torch.relu(scores[:, :, None] - self.knots.flatten(1)).flatten(1)
        ranks = torch.addmm(torch.addmm(self.base + self.share, scores, self.slope), risen, self.bends.flatten(0, 2))
        return ranks.gather(1, agrees.to(torch.int64))[:, 0]

    def allocate(self, share: float) -> None:
        """Give agreeing rows this share of the budget, and disagreeing rows the rest."""
        self.share.copy_(torch.tensor([math.log(1.0 - share), math.log(share)]))

    def measure(self, scores: Float64Array, agrees: BoolArray, weights: ScoreWeights = SCORE_WEIGHTS) -> None:
        """Take the curves from benign rows.

        Parameters
        ----------
        scores:
            (N, 4).
        agrees:
            (N,).
        weights:
            See `SCORE_WEIGHTS`.
        """
        n = len(scores)
        for buffer in (self.knots, self.bends, self.slope):
            buffer.zero_()
        for which, own in enumerate(weights):
            rows = scores[agrees == bool(which)][:, _COLUMNS[which]]
            curves = [_Curve.of(column, n) for column in rows.T]
            mixed = sum(weight * curve(column) for weight, curve, column in zip(own, curves, rows.T, strict=True))
            constant, slope = _line(np.sort(mixed)[::-1], n)
            self.base[which] = constant + sum(slope * w * c.base for w, c in zip(own, curves, strict=True))
            for column, weight, curve in zip(_COLUMNS[which], own, curves, strict=True):
                self.knots[column, which] = torch.from_numpy(curve.knots)
                self.bends[column, which, :, which] = torch.from_numpy(slope * weight * curve.bends)
                self.slope[column, which] = slope * weight * curve.slope


@dataclass(frozen=True)
class _Curve:
    """-ln(share of n benign rows that score at least x): base + slope * x + sum of bends * relu(x - knots)."""

    knots: Float64Array
    bends: Float64Array
    slope: float
    base: float

    def __call__(self, x: Float64Array) -> Float64Array:
        """(N,) levels of (N,) scores."""
        risen = np.maximum(x[:, None] - self.knots, 0.0) @ self.bends
        return np.asarray(self.base + self.slope * x + risen, np.float64)

    @classmethod
    def of(cls, scores: Float64Array, n: int) -> _Curve:
        """From the stratum's benign scores, out of n benign rows."""
        knots, bends = np.zeros(KNOTS), np.zeros(KNOTS)
        scores = np.sort(scores)[::-1]
        if len(scores) < 2:
            start = float(scores[0]) if len(scores) else 0.0
            return cls(knots, bends, _FLAT, -math.log(max(len(scores), 0.5) / n) - _FLAT * start)
        ranks = _dyadic(len(scores))
        x, level = scores[ranks - 1], -np.log(ranks / n)
        # Scores that are equal, or nearly, make one knot, at the rarest level: steep bends that cancel each other
        # leave nothing of a float32.
        kept = np.append(np.diff(x) > max(1e-6, 1e-4 * (x[-1] - x[0])), True)
        x, level = x[kept], level[kept]
        inner = np.diff(level) / np.diff(x)
        edge = inner if len(inner) else np.full(1, _FLAT)
        slopes = np.concatenate([[np.clip(edge[0], *_OUTER[0])], inner, [np.clip(edge[-1], *_OUTER[1])]])
        knots[: len(x)], bends[: len(x)] = x, np.diff(slopes)
        return cls(knots, bends, float(slopes[0]), float(level[0] - slopes[0] * x[0]))


def _line(levels: Float64Array, n: int) -> tuple[float, float]:
    """Constant and slope that make of falling mean levels the -ln of a share of n rows again.

    Where two orders differ, fewer rows are far out in their mean than in either.
    """
    if len(levels) < 2:
        return 0.0, 1.0
    ranks = _dyadic(len(levels))
    x, level = levels[ranks - 1], -np.log(ranks / n)
    if np.ptp(x) < 1e-6:
        return 0.0, 1.0
    slope = float(np.clip(np.polyfit(x, level, 1)[0], *_STRAIGHT))
    return float(np.mean(level - slope * x)), slope


def _dyadic(n: int) -> IntArray:
    """2, 4, 8, ..., n, falling."""
    ranks: IntArray = np.unique(np.minimum(2 ** np.arange(1, KNOTS), n))[::-1]
    return ranks
