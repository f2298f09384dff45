"""Detector, re-classifier and generator as torch modules, and their export to ONNX.

All three are small and do not depend on K: the detector reads a fixed number of features, the other two
score every class with one network shared over the classes. The exported graphs take probabilities and
hold everything from there on.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from fides_plugins.training.detector.features import (
    CLASS_FEATURES,
    DIVERGENCES,
    FEATURE_NAMES,
    KLS,
    Pair,
    TemperatureScaling,
    limit,
)
from fides_plugins.training.detector.strata import Strata
from fides_plugins.training.export import strip, to_onnx

SLOPE = 0.1
_FEATURES = len(FEATURE_NAMES)
_AGREEMENT = FEATURE_NAMES.index("agreement")


class Standardise(nn.Module):
    """(x - mean) / deviation, clipped to +-6, so that no foreign pair can leave the trained range."""

    mean: Tensor
    scale: Tensor

    def __init__(self, sample: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", sample.mean(dim=0))
        self.register_buffer("scale", 1.0 / (sample.std(dim=0) + 1e-3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.clamp((x - self.mean) * self.scale, -6.0, 6.0)


class Detector(nn.Module):
    """Mean logit of several small networks over one feature vector, trained side by side.

    Several networks in one: their weights are stacked in matrices (members, in, out), so that a call
    costs three multiplications however many there are. Each has two outputs, for rows on which the models
    disagree and for rows on which they agree; `strata` puts both into one order.
    """

    def __init__(self, sample: Tensor, members: int, width: int = 32, dropout: float = 0.2) -> None:
        super().__init__()
        self.standardise = Standardise(sample)
        sizes = ((_FEATURES, width), (width, width), (width, 2))
        self.weights = nn.ParameterList(nn.Parameter(_initial(members, a, b)) for a, b in sizes)
        self.biases = nn.ParameterList(nn.Parameter(torch.zeros(members, 1, b)) for _, b in sizes)
        self.dropout = nn.Dropout(dropout)
        self.strata = Strata()

    def members(self, features: Tensor) -> Tensor:
        """(members, N, 2) logits of features (N, F): attacked against benign, by stratum."""
        x: Tensor = self.standardise(features)[None]
        last = len(self.weights) - 1
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.matmul(x, weight) + bias
            if i < last:
                x = self.dropout(functional.leaky_relu(x, SLOPE))
        return x

    def logits(self, features: Tensor) -> Tensor:
        """(N, 2) mean logits."""
        return self.members(features).mean(dim=0)

    def forward(self, features: Tensor) -> Tensor:
        """(N,) ranks, see `Strata`."""
        return cast(Tensor, self.strata(to_be_ordered(self.logits(features), features), agreement_of(features) > 0.5))

    def merged(self) -> nn.Sequential:
        """The same logits of features as one plain network, (N, F) to (N, 2): fewer, larger operations.

        Members stand side by side in the first layer, keep apart in a block-diagonal second one, and are
        averaged by the third.
        """
        first, second, third = (weight.detach() for weight in self.weights)
        biases = [bias.detach() for bias in self.biases]
        count, inputs, width = first.shape
        merged = nn.Sequential(
            self.standardise,
            _linear(first.permute(1, 0, 2).reshape(inputs, count * width), biases[0].reshape(-1)),
            nn.LeakyReLU(SLOPE),
            _linear(_block_diagonal(second), biases[1].reshape(-1)),
            nn.LeakyReLU(SLOPE),
            _linear(third.reshape(count * width, 2) / count, biases[2].mean(dim=0).reshape(-1)),
        )
        return merged.eval()


class Reclassifier(nn.Module):
    """One network over (class features, places of the pair), the same for every class.

    It gives two scores for each class: that the un-attacked service would have chosen it, and that it is
    the true one. The second is trained only where there are labels.
    """

    def __init__(self, sample: Tensor, width: int = 48) -> None:
        super().__init__()
        self.standardise = Standardise(sample[:, DIVERGENCES:])
        # The context brings the bias; one of the scores would be the same for all classes.
        self.of_class = nn.Linear(CLASS_FEATURES, width, bias=False)
        self.of_pair = nn.Linear(_FEATURES - DIVERGENCES, width)
        self.hidden = nn.Linear(width, width)
        self.score = nn.Linear(width, 2, bias=False)

    def forward(self, class_features: Tensor, places: Tensor) -> Tensor:
        """(N, M, 2) scores of M classes from (N, M, CLASS_FEATURES) and `Pair.places`."""
        context = self.of_pair(self.standardise(places))[:, None, :]
        x = functional.leaky_relu(self.of_class(class_features) + context, SLOPE)
        x = functional.leaky_relu(self.hidden(x), SLOPE)
        return cast(Tensor, self.score(x))


class Generator(nn.Module):
    """The learned output attack: sees the service's answer only, returns one with another top class.

    That the top class changes is built in: the claimed class ends below the best other class by a margin
    that is learned, so no term of the loss has to ask for it.
    """

    scale: Tensor

    def __init__(self, service_temperature: float, width: int = 16) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(1.0 / service_temperature, dtype=torch.float32))
        self.of_class = nn.Linear(5, width)
        self.hidden = nn.Linear(width, width)
        self.change = nn.Linear(width, 2)
        nn.init.zeros_(self.change.weight)
        nn.init.zeros_(self.change.bias)

    def forward(self, service: Tensor, noise: Tensor) -> Tensor:
        """(N, K) attacked probabilities from clean ones and standard normal noise, (N, K) both."""
        logs = torch.log(torch.clamp_min(service, 1e-30))
        scaled = functional.log_softmax(logs * self.scale, dim=1)
        top = torch.topk(scaled, 2, dim=1).values
        is_top = (scaled >= top[:, :1]).to(service.dtype)
        columns = (
            limit(scaled - top[:, :1]) * 0.2,
            limit(scaled - top[:, 1:]) * 0.2,
            torch.exp(scaled),
            is_top,
            noise,
        )
        x = functional.leaky_relu(self.of_class(torch.stack(columns, dim=2)), SLOPE)
        x = self.change(functional.leaky_relu(self.hidden(x), SLOPE))
        moved = logs + limit(4.0 * x[:, :, 0])
        best_other = (moved - 1e4 * is_top).amax(dim=1, keepdim=True)
        margin = functional.softplus((x[:, :, 1] * is_top).sum(dim=1, keepdim=True)) + 0.01
        lowered = torch.minimum(moved, best_other - margin)
        return torch.softmax(moved + is_top * (lowered - moved), dim=1)


class DetectorGraph(nn.Module):
    """service, verification (N, K) -> score (N,) in (0, 1), 0.5 at the balanced threshold."""

    def __init__(self, scaling: TemperatureScaling, detector: Detector, balanced_rank: float) -> None:
        super().__init__()
        self.scaling, self.detector = scaling, detector.merged()
        self.strata = copy.deepcopy(detector.strata)
        self.strata.base.sub_(balanced_rank)

    def forward(self, service: Tensor, verification: Tensor) -> Tensor:
        return to_score(self.ranks(service, verification))

    def ranks(self, service: Tensor, verification: Tensor) -> Tensor:
        """(N,) ranks, see `Strata`, less the balanced one."""
        pair = Pair(self.scaling, service, verification)
        features = pair.features()
        return cast(Tensor, self.strata(to_be_ordered(self.detector(features), features), pair.agrees))


class ReclassifierGraph(nn.Module):
    """service, verification (N, K) -> probabilities (N, K), truth (N, K).

    `probabilities`: that the un-attacked service would have chosen the class. `truth`: that it is the
    true class; without labels in training this is the scaled reference itself.
    """

    def __init__(self, scaling: TemperatureScaling, reclassifier: Reclassifier, with_truth: bool) -> None:
        super().__init__()
        self.scaling, self.reclassifier = scaling, reclassifier
        self.with_truth = with_truth

    def forward(self, service: Tensor, verification: Tensor) -> tuple[Tensor, Tensor]:
        pair = Pair(self.scaling, service, verification)
        both = torch.softmax(self.reclassifier(pair.class_features(), pair.places()), dim=1)
        truth = both[:, :, 1] if self.with_truth else torch.exp(pair.logs[:, 1])
        return both[:, :, 0], truth


def to_be_ordered(logits: Tensor, features: Tensor) -> Tensor:
    """(N, 4) scores for `Strata`: the logits (N, 2) and KL, of the answers as they came and scaled."""
    return torch.cat((logits, features[:, :KLS]), dim=1)


def agreement_of(features: Tensor) -> Tensor:
    """(N, 1): 1 where both models choose the same class."""
    return features[:, _AGREEMENT : _AGREEMENT + 1]


def to_score(logit: Tensor) -> Tensor:
    """Map a logit to (0, 1) by (1 + x / (1 + |x|)) / 2.

    A sigmoid would round to exactly 1 in float32 from a logit of 17 on, and ties at the top are what
    calibration must not have.
    """
    return 0.5 + 0.5 * logit / (1.0 + torch.abs(logit))


def export(graph: nn.Module, inputs: Sequence[str], outputs: Sequence[str]) -> bytes:
    """ONNX bytes of a graph over (N, K) float32 inputs, N and K free.

    Parameters
    ----------
    graph:
        In evaluation mode afterwards.
    inputs, outputs:
        Tensor names; the first output axis is N.
    """
    graph.eval()
    example = tuple(torch.softmax(torch.randn(4, 7, generator=torch.Generator().manual_seed(i)), 1) for i in range(2))
    rows, classes = torch.export.Dim("rows", min=1), torch.export.Dim("classes", min=2)
    with torch.no_grad():
        shapes = tuple({0: rows, 1: classes} for _ in inputs)
        model = to_onnx(graph, example[: len(inputs)], inputs, outputs, shapes)
    strip(model)
    # Shapes of inner values are inferred anyway, and are a third of the bytes.
    model.graph.ClearField("value_info")
    return cast(bytes, model.SerializeToString(deterministic=True))


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    layer = nn.Linear(*weight.shape)
    with torch.no_grad():
        layer.weight.copy_(weight.T)
        layer.bias.copy_(bias)
    return layer


def _block_diagonal(weights: Tensor) -> Tensor:
    """(count, in, out) to (count * in, count * out)."""
    count, inputs, outputs = weights.shape
    blocks = torch.eye(count)[:, None, :, None] * weights[:, :, None, :]
    return blocks.reshape(count * inputs, count * outputs)


def _initial(members: int, fan_in: int, fan_out: int) -> Tensor:
    weight = torch.empty(members, fan_in, fan_out)
    for member in weight:
        nn.init.kaiming_uniform_(member.T, a=SLOPE, nonlinearity="leaky_relu")
    return weight
