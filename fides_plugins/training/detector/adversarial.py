"""Detector, re-classifier and generator trained together, as in Fides (Kumar et al., ASIA CCS 2024).

Rounds: attacks are drawn anew, the generator's among them; detector and re-classifier learn from them
and from benign rows; the generator learns to be taken for benign by the detector of that moment.

What is added to the paper, and why (measured in `docs/explanation/detection.md`):

- Features instead of one cross-entropy.
- *Replays* beside the named attacks: genuine answers of the same service to other inputs, see `replays.py`.
- Attacks are weighted while training: those on which the detector is behind a rule of thumb (plain
  disagreement, a threshold on KL) at the rule's own false-alarm rate gain weight, as in distributionally
  robust optimisation (Sagawa et al., ICLR 2020).
- *Misplaced* answers for the re-classifier, so that it does not learn the habits of the named attacks, see
  `misplacements.py`.
- Rows on which the models agree and rows on which they differ are two strata, scored apart. Each gets a share of the
  budget, and plain KL has a weight in either, see `strata.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from fides_plugins.training.attacks import OutputAttack
from fides_plugins.training.detector.calibration import fit_temperature
from fides_plugins.training.detector.features import DIVERGENCES, FLOORS, Pair, TemperatureScaling
from fides_plugins.training.detector.networks import Detector, Generator, Reclassifier, agreement_of, to_be_ordered
from fides_plugins.training.detector.pools import MISPLACED, Pool, Pools
from fides_plugins.training.detector.strata import LEARNED_ALONE, SCORE_WEIGHTS, ScoreWeights
from fides_plugins.training.predictions import Predictions

#: Called with the work done so far, from 0 to 1.
ProgressCallback = Callable[[float], None]

#: False-alarm rates at which the detector is held against a threshold on KL.
RULE_RATES = (0.01, 0.05)
#: What being behind a rule counts for an attack that changes the class, as against 1 for one that does not: it
#: does more harm, and a bootstrap can tell a third of the difference, since rule and detector then alarm on
#: nearly the same rows.
CHANGED_CLASS_COUNTS = 3.0
#: Networks in the detector; each leaves out its fold of the rows.
MEMBERS = 4
#: Shares of the budget that agreeing rows may get.
SHARES = (0.005, 0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3)
#: Answers are flattened, never sharpened. On a few hundred rows that all agree, the likeliest temperature is
#: zero, and at zero an answer says nothing but its class.
MIN_TEMPERATURE = 1.0


@dataclass(frozen=True)
class GanOptions:
    """How long and how hard to train. The defaults are meant to be left alone.

    Attributes
    ----------
    rounds:
        Times the attacks are drawn anew.
    steps:
        Detector and re-classifier steps per round; `None`: 36 passes over the rows, within 100 and 300.
    generator_steps:
        Generator steps per round.
    generator:
        Whether there is a generator; False leaves it out of training.
    batch:
        Benign rows per step; each attack adds half as many.
    learning_rate, weight_decay:
        Of AdamW, for the detector and for the re-classifier.
    agreeing_weight:
        Weight of tampered rows that still name the verification model's class, where disagreeing rows are
        scored.
    replay_weight:
        Weight of each of the kinds of replays, as against 1 for a named attack.
    regret_step, regret_clip, regret_limit:
        An attack's weight is multiplied by exp(step * regret) after each round, regret being the rule's
        true-alarm rate minus the detector's, at most the clip; it stays within 1 / limit and limit times
        its first value.
    misplaced_weight:
        Weight of a misplaced row for the re-classifier, as against 1 for a named attack's at first.
    error_step, error_limit:
        The same for the re-classifier, by its error minus the mean error over attacks.
    max_rows:
        Rows used per round; more are sampled down.
    class_limit:
        Classes that the re-classifier sees per row while training: the likeliest of both models, the
        right one, and a few at random whose weight makes up for the others.
    """

    rounds: int = 6
    steps: int | None = None
    generator_steps: int = 40
    generator: bool = True
    batch: int = 512
    learning_rate: float = 3e-3
    weight_decay: float = 1e-3
    agreeing_weight: float = 0.2
    replay_weight: float = 1.0
    regret_step: float = 15.0
    regret_limit: float = 40.0
    regret_clip: float = 0.15
    misplaced_weight: float = 6.0
    error_step: float = 8.0
    error_limit: float = 4.0
    max_rows: int = 20_000
    class_limit: int = 32


@dataclass(frozen=True)
class Networks:
    """What training gives."""

    scaling: TemperatureScaling
    detector: Detector
    reclassifier: Reclassifier
    generator: Generator
    with_truth: bool


def train_gan(
    rows: Predictions,
    attacks: Sequence[OutputAttack],
    seed: int = 0,
    options: GanOptions | None = None,
    progress: ProgressCallback | None = None,
) -> Networks:
    """Train the three networks.

    Parameters
    ----------
    rows:
        Clean pairs; with labels the re-classifier also learns the truth.
    attacks:
        Output attacks to learn from.
    seed:
        Same seed, same rows, same machine: same result.
    options:
        See `GanOptions`.
    progress:
        Told the share of the work done.
    """
    o = options or GanOptions()
    rng = np.random.default_rng(seed)
    if rows.n_rows > o.max_rows:
        rows = rows.take(np.sort(rng.permutation(rows.n_rows)[: o.max_rows]))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _Trainer(rows, tuple(attacks), o, rng).run(progress or (lambda done: None))


class _Trainer:
    def __init__(
        self, rows: Predictions, attacks: tuple[OutputAttack, ...], options: GanOptions, rng: np.random.Generator
    ) -> None:
        # Copies, because torch shares memory with numpy and takes no read-only arrays.
        self.rows = replace(rows, service=rows.service.copy(), verification=rows.verification.copy())
        self.options = options
        # Each model's temperature from the other's choice: certainty then tells how likely they agree.
        self.scaling = TemperatureScaling(
            max(MIN_TEMPERATURE, fit_temperature(rows.service, rows.verification.argmax(axis=1), FLOORS[0])),
            max(MIN_TEMPERATURE, fit_temperature(rows.verification, rows.service.argmax(axis=1), FLOORS[1])),
        )
        self.importance: dict[str, float] = {}
        self.difficulty = {MISPLACED: options.misplaced_weight}
        self.make = Pools(self.rows, attacks, self.scaling, MEMBERS, rng, options.replay_weight, options.class_limit)
        self.benign = self.make.benign()
        self.generator = Generator(self.scaling.temperatures[0])
        self.pools = self.make.attacked(None)
        self.misplaced = self.make.misplaced()
        sample = torch.cat([self.benign.features, *(p.features for p in self.pools)])
        self.detector = Detector(sample, MEMBERS)
        self.reclassifier = Reclassifier(sample)

    def run(self, progress: ProgressCallback) -> Networks:
        o = self.options
        n = self.rows.n_rows
        steps = o.steps or int(np.clip(36 * math.ceil(n / o.batch), 100, 300))
        total = o.rounds * steps
        optimisers, schedules = [], []
        for net in (self.detector, self.reclassifier):
            optimiser = torch.optim.AdamW(net.parameters(), lr=o.learning_rate, weight_decay=o.weight_decay)
            optimisers.append(optimiser)
            schedules.append(torch.optim.lr_scheduler.OneCycleLR(optimiser, o.learning_rate, total_steps=total))
        generator_optimiser = torch.optim.Adam(self.generator.parameters(), lr=3e-3)
        for round_ in range(o.rounds):
            if round_:
                self.pools = self.make.attacked(self.generator if o.generator else None)
                self.misplaced = self.make.misplaced()
            for net in (self.detector, self.reclassifier):
                net.train()
            for step in range(steps):
                for optimiser, schedule, loss in zip(optimisers, schedules, self._losses(), strict=True):
                    optimiser.zero_grad()
                    loss.backward()  # type: ignore[no-untyped-call]
                    optimiser.step()
                    schedule.step()
                if step % 10 == 0:
                    progress((round_ + step / steps) / o.rounds)
            self.detector.eval()
            self._weigh_attacks()
            if o.generator:
                self._train_generator(generator_optimiser)
        # What was learned is trained to stand alone; KL gets its weight at the end. The generator, which
        # evaluation attacks with, then learns to be taken for benign by the detector as it is used.
        self._order(SCORE_WEIGHTS, *by_precedence(self.pools))
        if o.generator:
            self._train_generator(generator_optimiser, by_rank=True)
        progress(1.0)
        for module in (self.detector, self.reclassifier, self.generator):
            module.eval()
        with_truth = self.rows.labels is not None
        return Networks(self.scaling, self.detector, self.reclassifier, self.generator, with_truth)

    def _losses(self) -> tuple[Tensor, Tensor]:
        """Detector and re-classifier loss of one batch: benign rows and half as many of each attack."""
        o = self.options
        picks = [(self.benign, torch.randint(len(self.benign), (o.batch,)))]
        picks += [(p, torch.randint(len(p), (o.batch // 2,))) for p in self.pools]
        features = torch.cat([p.features[i] for p, i in picks])
        benign = o.batch
        weights = torch.cat([p.weight[i] * self.importance.get(p.name, 1.0) for p, i in picks[1:]])
        target = torch.zeros(len(features))
        target[benign:] = 1.0
        share = torch.cat([torch.full((benign,), 1.0 / benign), weights / weights.sum()])
        # Every member on its own, so that they stay different; their mean is what is used. The agreeing rows'
        # output learns from them alone. The other learns from all, agreeing lies counting little: often there
        # are only a handful of benign rows that disagree.
        both = self.detector.members(features)
        agrees = agreement_of(features)[:, 0]
        losses = functional.binary_cross_entropy_with_logits(both, target[:, None].expand_as(both), reduction="none")
        # Each member leaves out the rows of one fold, and judges them later, see `_held_out`.
        fold = torch.cat([p.fold[i] for p, i in picks])
        seen = (fold != torch.arange(len(both))[:, None]).float()
        losses = (losses * seen[:, :, None]).mean(dim=0) / (1.0 - 1.0 / len(both))
        light = 1.0 - (1.0 - o.agreeing_weight) * agrees * target
        # Few lies agree; alarms on them are no rarer for that, so they are made to weigh as much as benign rows.
        listed = share * agrees
        even = listed[:benign].sum() / torch.clamp_min(listed[benign:].sum(), 1e-6)
        listed = listed * (1.0 + (even - 1.0) * target)
        detector_loss = (share * light * losses[:, 0] + listed * losses[:, 1]).sum()

        # The re-classifier is asked about attacked rows, so lies about the label are the rule; a few rows that keep
        # theirs stand for false alarms. In a replay nothing of the right answer is left: a few teach it to follow the
        # verification model where the claim makes no sense, whatever attack made it.
        few = {True: o.batch // 2, False: o.batch // 96}
        asked = [(p, i[: o.batch // 16 if p.replay else few[p.lies]]) for p, i in picks if p.lies or not p.replay]
        asked.append((self.misplaced, torch.randint(len(self.misplaced), (o.batch,))))
        scores = self.reclassifier(
            torch.cat([p.class_features[i] for p, i in asked]),
            torch.cat([p.features[i, DIVERGENCES:] for p, i in asked]),
        )
        scores = scores + torch.cat([p.log_offset[i] for p, i in asked])[:, :, None]
        share = torch.cat([torch.full((len(i),), self.difficulty.get(p.name, 1.0)) for p, i in asked])
        own = torch.cat([p.own_class[i] for p, i in asked])
        loss = functional.cross_entropy(scores[:, :, 0], own, reduction="none") @ share / share.sum()
        if self.rows.labels is not None:
            truth = torch.cat([p.truth[i] for p, i in asked if p.truth is not None])
            loss = loss + functional.cross_entropy(scores[:, :, 1], truth)
        return detector_loss, loss

    @torch.no_grad()
    def _weigh_attacks(self) -> None:
        """Give weight to attacks on which a rule of thumb is ahead."""
        o = self.options
        for pool, regrets in zip(self.pools, self._order(LEARNED_ALONE, self.pools, []), strict=True):
            # Behind one rule is behind; ahead of all of them, an attack leaves its weight to the others.
            behind = max(regrets)
            regret = behind if behind > 0.002 else float(np.mean(np.clip(regrets, -0.05, 0.0)))
            weight = self.importance.get(pool.name, 1.0) * math.exp(o.regret_step * min(regret, o.regret_clip))
            self.importance[pool.name] = float(np.clip(weight, 1.0 / o.regret_limit, o.regret_limit))
        self._weigh_errors()

    @torch.no_grad()
    def _order(self, weights: ScoreWeights, first: Sequence[Pool], then: Sequence[Pool]) -> list[list[float]]:
        """Measure the strata and divide the budget between them; the regrets left on `first`, see `_regrets`.

        The share is one that `first` can't tell from its best; among those, one that `then` can't tell from its best;
        among those, the smallest: what was trained on looks better than it is.
        """
        strata = self.detector.strata
        benign = self._held_out(self.benign)
        strata.measure(benign.double().numpy(), self.benign.agrees[:, 0].numpy(), weights)
        attacked = [self._held_out(pool) for pool in first]
        left = self._cheapest(SHARES, benign, first, attacked)
        left = self._cheapest(left, benign, then, [self._held_out(pool) for pool in then])
        strata.allocate(left[0])
        return self._regrets(benign, first, attacked)

    def _cheapest(
        self, shares: Sequence[float], benign: Tensor, pools: Sequence[Pool], attacked: list[Tensor]
    ) -> Sequence[float]:
        """The shares that these pools can't tell from the one whose largest regret is least; all without pools."""
        if not pools:
            return shares
        worst = []
        for share in shares:
            self.detector.strata.allocate(share)
            worst.append(max(max(regrets) for regrets in self._regrets(benign, pools, attacked)))
        return close_to_least(shares, worst, 0.25 / math.sqrt(len(benign)))

    def _held_out(self, pool: Pool) -> Tensor:
        """(N, 4) scores, each row's by the member that was not trained on it."""
        return to_be_ordered(self.detector.members(pool.features)[pool.fold, torch.arange(len(pool))], pool.features)

    def _regrets(self, benign: Tensor, pools: Sequence[Pool], attacked: list[Tensor]) -> list[list[float]]:
        """By attack: each rule's true-alarm rate minus the detector's, at equal false-alarm rate.

        Parameters
        ----------
        benign, attacked:
            (N, 4) scores of benign rows, and of each pool's.
        """
        strata = self.detector.strata
        ranks = strata(benign, self.benign.agrees).numpy()
        own_rate = 1.0 - float(self.benign.agrees.float().mean())
        regrets = []
        for pool, scores in zip(pools, attacked, strict=True):
            lies = strata(scores, pool.agrees).numpy()
            of = [1.0 - float(pool.agrees.float().mean()) - _caught(ranks, lies, own_rate)]
            of += [_caught(self.benign.kl, pool.kl, rate) - _caught(ranks, lies, rate) for rate in RULE_RATES]
            counts = CHANGED_CLASS_COUNTS if pool.lies else 1.0
            regrets.append([counts * regret for regret in of])
        return regrets

    @torch.no_grad()
    def _weigh_errors(self) -> None:
        """Give weight to attacks from which the re-classifier recovers less than from the others."""
        o = self.options
        errors = {}
        for pool in self.pools:
            if pool.lies and not pool.replay:
                some = slice(None, 4096)
                scores = self.reclassifier(pool.class_features[some], pool.features[some, DIVERGENCES:])[:, :, 0]
                chosen = (scores + pool.log_offset[some]).argmax(dim=1)
                errors[pool.name] = float((chosen != pool.own_class[some]).float().mean())
        typical = float(np.mean(list(errors.values()))) if errors else 0.0
        for name, error in errors.items():
            weight = self.difficulty.get(name, 1.0) * math.exp(o.error_step * (error - typical))
            self.difficulty[name] = float(np.clip(weight, 1.0 / o.error_limit, o.error_limit))

    def _train_generator(self, optimiser: torch.optim.Optimizer, by_rank: bool = False) -> None:
        """Let the generator lower the detector's logit, or its rank, on its own attacks."""
        service, verification = torch.from_numpy(self.rows.service), torch.from_numpy(self.rows.verification)
        batch = max(32, min(self.options.batch, 2**19 // self.rows.n_classes))
        with _frozen(self.detector):
            for _ in range(self.options.generator_steps):
                i = torch.randint(len(service), (batch,))
                attacked = self.generator(service[i], torch.randn(len(i), service.shape[1]))
                pair = Pair(self.scaling, attacked, verification[i])
                features = pair.features()
                if by_rank:
                    loss = self.detector(features).mean()
                else:
                    both = self.detector.logits(features)
                    loss = functional.softplus(torch.where(pair.agrees, both[:, 1:], both[:, :1])).mean()
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()


def by_precedence(pools: Sequence[Pool]) -> tuple[list[Pool], list[Pool]]:
    """Pools that decide first how the budget is divided in the end, and pools that choose from what is left.

    A replay stands in for attacks that training does not see. Where a named attack does the same, changes the class
    or keeps it, that one tells better what is lost: a rule of thumb that is ahead on replays alone would take the
    budget from attacks that both are measured on.
    """
    named = {pool.lies for pool in pools if not pool.replay}
    first: list[Pool] = []
    then: list[Pool] = []
    for pool in pools:
        (then if pool.replay and pool.lies in named else first).append(pool)
    return first, then


def close_to_least(shares: Sequence[float], regrets: Sequence[float], apart: float) -> list[float]:
    """The shares whose regret is at most `apart` above the least."""
    enough = min(regrets) + apart
    return [share for share, regret in zip(shares, regrets, strict=True) if regret <= enough]


def _caught(benign: NDArray[Any], attacked: NDArray[Any], rate: float) -> float:
    """Share of attacked scores above the threshold that a share `rate` of benign ones exceeds."""
    threshold = np.sort(benign)[::-1][min(int(rate * len(benign)), len(benign) - 1)]
    return float((attacked > threshold).mean())


class _frozen:
    """Within the block, a module's parameters take no gradient."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __enter__(self) -> None:
        self.module.requires_grad_(False)

    def __exit__(self, *exception: object) -> None:
        self.module.requires_grad_(True)
