"""Rows whose two models agree and rows whose models don't, put into one order. Part of the detector's graph.

A changed class shows as disagreement, a changed confidence does not. One score for both has to trade them
against each other everywhere: what lifts tampered agreeing rows above the few most suspicious benign ones also
lifts them above the many disagreeing ones, and then a plain "do they disagree?" is the better detector. So each
list has scores of its own, is measured in its own false alarms, and gets a share of the budget: a row's rank is
-ln of the budget at which its list's share reaches it (weighted Bonferroni; Holm, "A Simple Sequentially
Rejective Multiple Test Procedure", 1979).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from fides_plugins.types import BoolArray, Float64Array

#: Bends of a list's curve: the benign rows at rank 2, 4, 8, ... This many hold 2**15 rows.
KNOTS = 16
#: Slopes outside the range of benign scores, where there is nothing to measure; (below, above).
_OUTER = ((0.05, 1.0), (0.1, 2.0))
#: Slope of a list with too few benign rows for a curve.
_FLAT = 0.25
#: At the beginning of training.
FIRST_SHARE = 0.1


class Lists(nn.Module):
    """(N, 2) logits, as if the models disagreed and as if they agreed, to (N,) ranks.

    Each list's curve is piecewise linear: base + slope * x + sum of bends * relu(x - knots).
    """

    knots: Tensor
    bends: Tensor
    slope: Tensor
    base: Tensor
    share: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("knots", torch.zeros(2, KNOTS))
        self.register_buffer("bends", torch.zeros(2, KNOTS))
        self.register_buffer("slope", torch.ones(2))
        self.register_buffer("base", torch.zeros(2))
        self.register_buffer("share", torch.zeros(2))
        self.give(FIRST_SHARE)

    def forward(self, logits: Tensor, agreement: Tensor) -> Tensor:
        """-ln of the budget that reaches a row.

        Parameters
        ----------
        logits:
            (N, 2).
        agreement:
            (N, 1), 1 where the models agree.
        """
        risen = (torch.relu(logits[:, :, None] - self.knots) * self.bends).sum(dim=2)
        ranks = risen + logits * self.slope + (self.base + self.share)
        return torch.where(agreement[:, 0] > 0.5, ranks[:, 1], ranks[:, 0])

    def give(self, share: float) -> None:
        """Give agreeing rows this share of the budget, and disagreeing rows the rest."""
        self.share.copy_(torch.tensor([math.log(1.0 - share), math.log(share)]))

    def measure(self, logits: Float64Array, agrees: BoolArray) -> None:
        """Take the curves from benign rows.

        Parameters
        ----------
        logits:
            (N, 2).
        agrees:
            (N,).
        """
        for which in (0, 1):
            scores = np.sort(logits[agrees == bool(which), which])[::-1]
            knots, bends, slope, base = _curve(scores, len(logits))
            self.knots[which], self.bends[which] = torch.from_numpy(knots), torch.from_numpy(bends)
            self.slope[which], self.base[which] = slope, base


def _curve(scores: Float64Array, n: int) -> tuple[Float64Array, Float64Array, float, float]:
    """Knots, bends, slope and base of -ln(share of n benign rows that score at least x), from falling scores."""
    knots, bends = np.zeros(KNOTS), np.zeros(KNOTS)
    if len(scores) < 2:
        start = float(scores[0]) if len(scores) else 0.0
        return knots, bends, _FLAT, -math.log(max(len(scores), 0.5) / n) - _FLAT * start
    ranks = np.unique(np.minimum(2 ** np.arange(1, KNOTS), len(scores)))[::-1]
    x, level = scores[ranks - 1], -np.log(ranks / n)
    # Equal scores make one knot, at the rarest level.
    kept = np.append(np.diff(x) > 1e-6, True)
    x, level = x[kept], level[kept]
    inner = np.diff(level) / np.diff(x)
    edge = inner if len(inner) else np.full(1, _FLAT)
    slopes = np.concatenate([[np.clip(edge[0], *_OUTER[0])], inner, [np.clip(edge[-1], *_OUTER[1])]])
    knots[: len(x)], bends[: len(x)] = x, np.diff(slopes)
    return knots, bends, float(slopes[0]), float(level[0] - slopes[0] * x[0])
