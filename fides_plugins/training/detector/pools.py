"""Rows to learn from: benign ones, and each attack's, with all that a step of training needs of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fides_plugins.statistics import divergences
from fides_plugins.training.attacks import GENERATOR, OutputAttack
from fides_plugins.training.attacks.misplacements import misplace
from fides_plugins.training.attacks.replays import REPLAYS, RankedAnswers
from fides_plugins.training.detector.features import CLASS_FEATURES, Pair, TemperatureScaling
from fides_plugins.training.detector.networks import Generator
from fides_plugins.training.predictions import Predictions
from fides_plugins.types import Float32Array, Float64Array, IntArray

#: The pool from which the re-classifier learns what holds whatever an attack does.
MISPLACED = "misplaced"


@dataclass
class Pool:
    """Features of one attack's rows (or the benign ones), ready for batches.

    `agrees` is (P, 1) bool, as `Strata` takes it.
    """

    name: str
    lies: bool
    replay: bool
    features: Tensor
    class_features: Tensor
    log_offset: Tensor
    own_class: Tensor
    truth: Tensor | None
    weight: Tensor
    agrees: Tensor
    fold: Tensor
    kl: Float64Array

    def __len__(self) -> int:
        return len(self.features)


class Pools:
    """Makes pools of the rows of one pair.

    Parameters
    ----------
    rows:
        Clean pairs.
    attacks:
        Output attacks to apply.
    scaling:
        Temperatures of the features.
    folds:
        Each row belongs to one of so many, and takes its fold into every pool.
    rng:
        Draws folds and attacks.
    replay_weight, class_limit:
        See `adversarial.GanOptions`.
    """

    def __init__(
        self,
        rows: Predictions,
        attacks: Sequence[OutputAttack],
        scaling: TemperatureScaling,
        folds: int,
        rng: np.random.Generator,
        replay_weight: float,
        class_limit: int,
    ) -> None:
        self.rows, self.attacks, self.scaling, self.rng = rows, attacks, scaling, rng
        self.replay_weight, self.class_limit = replay_weight, class_limit
        self.answers = RankedAnswers(rows.service)
        self.fold = torch.from_numpy(rng.permutation(rows.n_rows) % folds)

    def benign(self) -> Pool:
        """The rows as they are."""
        return self._pool("", self.rows.service, np.arange(self.rows.n_rows), 0.0, lies=False)

    def attacked(self, generator: Generator | None) -> list[Pool]:
        """One pool for each attack, the replays, and the generator where there is one; drawn anew."""
        pools = []
        for attack in self.attacks:
            attacked, changed = attack.apply(self.rows.service, self.rng)
            rows = np.flatnonzero(changed)
            pools.append(self._pool(attack.name, attacked[rows], rows, attack.weight, attack.changes_label))
        for replay in REPLAYS:
            replayed, rows = replay.apply(self.answers, self.rng)
            pools.append(self._pool(replay.name, replayed, rows, self.replay_weight, replay.changes_label, True))
        if generator is not None:
            with torch.no_grad():
                noise = torch.from_numpy(self.rng.standard_normal(self.rows.service.shape, dtype=np.float32))
                lies = generator(torch.from_numpy(self.rows.service), noise).numpy()
            pools.append(self._pool(GENERATOR, lies, np.arange(self.rows.n_rows), 1.0))
        return [p for p in pools if len(p)]

    def misplaced(self) -> Pool:
        """Lies of no attack in particular, drawn anew."""
        lies = misplace(self.rows.service, self.rng)
        return self._pool(MISPLACED, lies, np.arange(self.rows.n_rows), 1.0, replay=True)

    @torch.no_grad()
    def _pool(
        self, name: str, service: Float32Array, of: IntArray, weight: float, lies: bool = True, replay: bool = False
    ) -> Pool:
        """Features of attacked answers (P, K) of the rows `of` (P,), computed in pieces."""
        k = self.rows.n_classes
        piece = max(64, 2_000_000 // k)
        parts: list[tuple[Tensor, ...]] = []
        kl: list[Float64Array] = []
        for start in range(0, len(of), piece):
            index = of[start : start + piece]
            verification = torch.from_numpy(self.rows.verification[index])
            claimed = torch.from_numpy(np.array(service[start : start + piece]))
            pair = Pair(self.scaling, claimed, verification)
            own = torch.from_numpy(self.answers.own[index])
            truth = own if self.rows.labels is None else torch.from_numpy(self.rows.labels[index])
            columns, offset = self._candidates(pair, own, truth)
            class_features = pair.class_features().gather(1, columns[:, :, None].expand(-1, -1, CLASS_FEATURES))
            at = [(columns == wanted[:, None]).to(torch.int64).argmax(dim=1) for wanted in (own, truth)]
            # Where the models differ anyway, an answer that keeps its class has nothing to teach.
            weights = weight * (torch.ones(len(index)) if lies else pair.agreement[:, 0])
            parts.append((pair.features(), class_features, offset, at[0], at[1], weights, pair.agrees))
            kl.append(divergences.kl(claimed.numpy(), verification.numpy()))
        if not parts:
            empty = torch.empty(0)
            return Pool(name, lies, replay, empty, empty, empty, empty, empty, empty, empty, empty, np.empty(0))
        f, c, offset, own_at, truth_at, w, agree = (torch.cat(column) for column in zip(*parts, strict=True))
        labelled = truth_at if self.rows.labels is not None else None
        fold = self.fold[torch.from_numpy(of)]
        return Pool(name, lies, replay, f, c, offset, own_at, labelled, w, agree, fold, np.concatenate(kl))

    def _candidates(self, pair: Pair, own: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
        """(N, M) class indices and log-weights: all classes where they are few, else a sample."""
        n, _, k = pair.logs.shape
        limit = self.class_limit
        if k <= limit:
            return torch.arange(k).expand(n, k), torch.zeros(n, k)
        at_random = limit // 4
        likely = limit - at_random
        rank = (pair.logs - pair.top[:, :, :1]).amax(dim=1)
        rank = rank.scatter(1, own[:, None], 2.0).scatter(1, truth[:, None], 1.0)
        order = torch.argsort(rank, dim=1, descending=True)
        others = order[:, likely:].gather(1, torch.randint(k - likely, (n, at_random)))
        columns = torch.cat([order[:, :likely], others], dim=1)
        offset = torch.zeros(n, limit)
        offset[:, likely:] = math.log((k - likely) / at_random)
        return columns, offset
