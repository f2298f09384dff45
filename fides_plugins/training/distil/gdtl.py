"""Greedy Distillation Transfer Learning: the cheapest student that agrees with the service often enough.

After Kumar et al. (ASIA CCS 2024). Students are tried in order of cost. A pre-trained one begins with
everything frozen under a fresh head; then the group of layers nearest the output is unfrozen, batch norms
excepted, and so on, as long as each step raises agreement on held-out rows by more than a tolerance. A larger
student is tried only where the wanted agreement was not reached. Students that are not pre-trained have
nothing to keep and are trained as a whole, in one step.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from fides_plugins.errors import TrainingError
from fides_plugins.statistics.intervals import wilson
from fides_plugins.training.costs import Cost
from fides_plugins.training.distil.distillation import (
    DistillationSettings,
    Share,
    TransferSet,
    agreement,
    distil,
    is_batch_norm,
    predict,
    silent,
)
from fides_plugins.training.distil.pretrained import PretrainedNetwork
from fides_plugins.training.distil.students import Student, VerificationModel
from fides_plugins.training.distil.workers import Worker
from fides_plugins.types import Float32Array

#: A backbone is cut into at most this many groups of layers; one is unfrozen at a time.
MAX_GROUPS = 5
#: Where a student stays so far behind the wanted agreement, of those that take long to train, with so many
#: multiply-adds a row, only the most expensive one is tried after it.
FAR_AWAY = 0.1
CHEAP_MACS = 500_000


@dataclass(frozen=True)
class SearchStep:
    """One row of the trade-off table. `kept` is False for a step that did not pay and was undone."""

    student: str
    action: str
    parameters: int
    macs: int
    trainable: int
    agreement: float
    kept: bool


@dataclass(frozen=True)
class GdtlResult:
    """The chosen verification model and how it was found.

    `agreement` is measured on the held-out rows; `reached` says whether it is what was wanted; `unfrozen` is the number
    of groups of layers of a pre-trained student that were trained.
    """

    model: VerificationModel
    chosen: Student
    unfrozen: int
    cost: Cost
    agreement: float
    reached: bool
    steps: tuple[SearchStep, ...]

    @property
    def student(self) -> str:
        """Name of the chosen student."""
        return self.chosen.name


@dataclass(frozen=True, eq=False)
class Search:
    """Finds the cheapest student that reaches the wanted agreement.

    Attributes
    ----------
    transfer:
        What students are trained on.
    images, logits:
        Held-out rows (M, ...) that no student is trained on, and the service's logits (M, K) for them; every step is
        judged on these.
    agreement:
        Wanted share of held-out rows on which student and service have the same top class. The search stops
        at the first student whose agreement exceeds it by the estimate's own error, see `certain`.
    tolerance:
        A step that raises held-out agreement by no more than this is undone, and the student is finished.
    distillation, seed, who:
        How students are trained, their random numbers, and who trains; see `distil`.
    """

    transfer: TransferSet
    images: NDArray[Any]
    logits: Float32Array
    agreement: float = 0.98
    tolerance: float = 0.002
    distillation: DistillationSettings = field(default_factory=DistillationSettings)
    seed: int = 0
    who: Worker = field(default_factory=Worker)

    def run(
        self,
        students: Sequence[Student],
        max_parameters: int | None = None,
        max_macs: int | None = None,
        progress: Share = silent,
    ) -> GdtlResult:
        """Try candidates in the order of their multiply-adds; those above a limit are left out.

        Returns
        -------
        The first student that certainly reaches the agreement (see `certain`). If none does, the one with the highest
        agreement, and among equals the one with the lowest divergence from the service. Where the held-out rows are
        too few to be certain of any student, only the most expensive one is trained; where a student stays far behind,
        of the dear ones only that one after it.

        Raises
        ------
        TrainingError
            If no student is within the limits.
        """
        rows = self.transfer.images
        priced = sorted(((s.cost(rows), s) for s in students), key=lambda c: (c[0].macs, c[0].parameters))
        fitting = [(cost, student) for cost, student in priced if cost.within(max_parameters, max_macs)]
        if not fitting:
            cheapest = f"{priced[0][0].parameters} parameters, {priced[0][0].macs} multiply-adds" if priced else "none"
            raise TrainingError(
                f"No student costs at most {max_parameters} parameters and {max_macs} multiply-adds; "
                f"the cheapest one given: {cheapest}.",
                "Allow a larger share of the service's cost, or give a smaller student.",
            )
        if not self.is_certain(1.0):
            fitting = fitting[-1:]
        steps: list[SearchStep] = []
        best: tuple[tuple[float, float], GdtlResult] | None = None
        for index, (cost, student) in enumerate(fitting):
            far = best is not None and best[1].agreement < self.agreement - FAR_AWAY
            if far and cost.macs > CHEAP_MACS and index < len(fitting) - 1:
                continue

            def report(done: float, index: int = index) -> None:
                progress((index + done) / len(fitting))

            model = student.model(rows, self.seed)
            value, unfrozen = _Training(self, student.name, cost, model, report, steps).run()
            rank = (value, -divergence(self.logits, predict(model, self.images)))
            if best is None or rank > best[0]:
                best = rank, GdtlResult(model, student, unfrozen, cost, value, value >= self.agreement, ())
            if self.is_certain(value):
                break
        progress(1.0)
        assert best is not None
        return replace(best[1], steps=tuple(steps))

    def again(self, found: GdtlResult, transfer: TransferSet, progress: Share = silent) -> VerificationModel:
        """A model like the one found, trained in the same steps and epochs on other rows, by this process alone."""
        epochs = self.distillation.epochs_for(found.cost.macs, self.transfer.n_rows)
        how = replace(self.distillation, epochs=epochs, fewest_epochs=epochs)
        search = replace(self, transfer=transfer, distillation=how, who=Worker.alone())
        model = found.chosen.model(transfer.images, self.seed)
        _Training(search, found.student, found.cost, model, progress, [], found.unfrozen).run()
        return model

    def is_certain(self, share: float) -> bool:
        """Whether this share of the held-out rows is surely enough."""
        return certain(share, len(self.images), self.agreement)


def certain(share: float, n_rows: int, wanted: float) -> bool:
    """Whether a share seen on `n_rows` rows exceeds what is wanted by one standard error.

    The lower end of Wilson's interval with z = 1; the plain standard error is 0 at a share of 1.
    """
    return wilson(share * n_rows, n_rows, z=1.0)[0] >= wanted - 1e-12


def divergence(service: Float32Array, student: Float32Array) -> float:
    """Mean Kullback-Leibler divergence of the student's distributions from the service's, both logits (N, K)."""
    log_s, log_v = (functional.log_softmax(torch.from_numpy(logits), dim=1) for logits in (service, student))
    return float(functional.kl_div(log_v, log_s, reduction="batchmean", log_target=True))


@dataclass(frozen=True)
class _Training:
    """The training of one student, which adds its steps to `steps`; `unfreeze` groups of layers, or greedily."""

    search: Search
    student: str
    cost: Cost
    model: VerificationModel
    report: Share
    steps: list[SearchStep]
    unfreeze: int | None = None

    def run(self) -> tuple[float, int]:
        """All layers at once, or a fresh head and then one group of layers after the other.

        Returns
        -------
        Agreement on the held-out rows, and the groups of layers that were unfrozen.
        """
        network, search = self.model.network, self.search
        images = torch.from_numpy(search.transfer.images)
        if not isinstance(network, PretrainedNetwork):
            self._train(self.model, images, search.distillation.learning_rate, 0, 1)
            return self._note("train all layers", kept=True), 0
        for parameter in network.backbone.parameters():
            parameter.requires_grad_(False)
        groups = layer_groups(network.backbone, MAX_GROUPS)
        n_steps = 1 + len(groups)
        # Nothing below the head moves, so its inputs are computed once.
        body = nn.Sequential(self.model.preprocess, network.backbone, network.pool)
        features = torch.from_numpy(predict(body, search.transfer.images))
        self._train(network.head, features, search.distillation.learning_rate, 0, n_steps)
        value, unfrozen = self._note("fresh head", kept=True), 0
        for number, group in enumerate(groups):
            if search.is_certain(value) if self.unfreeze is None else number == self.unfreeze:
                break
            before = copy.deepcopy(network.state_dict())
            for layer in group:
                for parameter in layer.parameters(recurse=False):
                    parameter.requires_grad_(True)
            self._train(self.model, images, search.distillation.fine_tune_learning_rate, number + 1, n_steps)
            after = self._agreement()
            paid = self.unfreeze is not None or after > value + search.tolerance
            self._note(f"unfreeze {len(group)} layers", kept=paid, value=after)
            if not paid:
                network.load_state_dict(before)
                break
            value, unfrozen = after, number + 1
        self.model.eval()
        return value, unfrozen

    def _train(self, module: nn.Module, inputs: torch.Tensor, rate: float, step: int, n_steps: int) -> None:
        search = self.search

        def on_epoch(done: float) -> None:
            self.report((step + done) / n_steps)

        how, seed = search.distillation, search.seed + step
        epochs = how.epochs_for(self.cost.macs, search.transfer.n_rows)
        distil(module, inputs, search.transfer, how, rate, epochs, seed, on_epoch, search.who)

    def _agreement(self) -> float:
        """On the held-out rows."""
        return agreement(predict(self.model, self.search.images), self.search.logits)

    def _note(self, action: str, *, kept: bool, value: float | None = None) -> float:
        value = self._agreement() if value is None else value
        trainable = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        cost = self.cost
        self.steps.append(SearchStep(self.student, action, cost.parameters, cost.macs, trainable, value, kept))
        return value


def layer_groups(backbone: nn.Module, max_groups: int) -> list[list[nn.Module]]:
    """Layers with parameters of their own, batch norms excepted, in groups: those nearest the output first.

    Groups have about the same number of layers; the order is that of registration, which for sequential
    networks is the order of the computation.
    """
    layers = [m for m in backbone.modules() if not is_batch_norm(m) and any(True for _ in m.parameters(recurse=False))]
    layers.reverse()
    n = min(max_groups, len(layers))
    edges = np.round(np.linspace(0, len(layers), n + 1)).astype(int)
    return [layers[a:b] for a, b in itertools.pairwise(edges)]
