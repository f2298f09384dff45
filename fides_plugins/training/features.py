"""What detector and re-classifier see of a pair of answers. Part of the exported graphs.

Both work on *tempered* log-probabilities: log p / T, normalised again, with one temperature for each
model. Distilled and fine-tuned networks are often certain to many digits; in float32 probabilities the
digits are still there, and a temperature brings them back to a scale on which certainty says how likely
the two are to agree (Guo et al., "On Calibration of Modern Neural Networks", ICML 2017).

No feature depends on the number or on the order of the classes' columns, so one network serves any K.
The divergences are those of `fides_plugins.divergences`; a test holds the two to 1e-5 of each other.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from fides_plugins.divergences import EPSILON

#: Stands for a class that is not there; below every tempered log-probability.
LOG_PAD = -1e4
#: Log-ratios are clipped here before they enter a network.
LOG_RATIO_LIMIT = 20.0
#: The highest classes looked at one by one. A K of 2 is padded.
TOP = 3

FEATURE_NAMES: tuple[str, ...] = (
    "kl",
    "kl_reverse",
    "entropy_service",
    "entropy_verification",
    "cross_entropy",
    "js",
    "total_variation",
    "verification_rank_of_claimed",
    "service_rank_of_verified",
    "agreement",
    "service_top1",
    "verification_top1",
    "service_margin12",
    "service_margin23",
    "verification_margin12",
    "verification_margin23",
    "verification_of_claimed1",
    "verification_of_claimed2",
    "service_of_verified1",
    "service_of_verified2",
    "exchange_gain",
)
#: So many of them are divergences; the others say how the classes are placed.
DIVERGENCES = 7
#: Columns of the per-class matrix, see `Pair.class_features`.
CLASS_FEATURES = 13

# The first seven features from (s.ln s, s.ln v, v.ln s, v.ln v, m.ln m, |s - v|.1) with m the mean of s and v.
_FROM_SUMS = (
    (1.0, 0.0, -1.0, 0.0, 0.0, 0.5, 0.0),
    (-1.0, 0.0, 0.0, 0.0, -1.0, 0.0, 0.0),
    (0.0, -1.0, 0.0, 0.0, 0.0, 0.0, 0.0),
    (0.0, 1.0, 0.0, -1.0, 0.0, 0.5, 0.0),
    (0.0, 0.0, 0.0, 0.0, 0.0, -1.0, 0.0),
    (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.5),
)
_OTHER_WAY = (1, 0)


class Temper(nn.Module):
    """Both models' probabilities (N, K) to tempered log-probabilities, stacked to (N, 2, K)."""

    scale: Tensor

    def __init__(self, service_temperature: float, verification_temperature: float) -> None:
        super().__init__()
        temperatures = torch.tensor([service_temperature, verification_temperature], dtype=torch.float32)
        self.register_buffer("scale", (1.0 / temperatures)[:, None])

    @property
    def temperatures(self) -> tuple[float, float]:
        """Of the service and of the verification model."""
        service, verification = (1.0 / self.scale[:, 0]).tolist()
        return service, verification

    def forward(self, service: Tensor, verification: Tensor) -> Tensor:
        """log_softmax(log p / T)."""
        logs = torch.log(torch.clamp_min(torch.stack((service, verification), dim=1), 1e-30))
        return functional.log_softmax(logs * self.scale, dim=2)


class Pair:
    """The tempered pair and what several features share, computed once.

    Both models are worked on side by side in one tensor: a graph for single rows costs what its number of
    operations costs, not what they compute.

    Parameters
    ----------
    logs:
        (N, 2, K) from `Temper`: the service, then the verification model.
    """

    def __init__(self, logs: Tensor) -> None:
        self.logs = logs
        top = torch.topk(functional.pad(logs, (0, max(0, TOP - 2)), value=LOG_PAD), TOP, dim=2)
        self.top = top.values
        crossed = _swap(logs)
        # Only two are gathered, so that the padding's index is never used.
        self.other = crossed.gather(2, top.indices[:, :, :2])
        # Classes that the other model finds likelier than this one's choice; 0: the same choice (or a tie).
        self.rank = (crossed > self.other[:, :, :1]).to(logs.dtype).sum(dim=2)

    @property
    def agreement(self) -> Tensor:
        """(N, 1) float: 1 where the service's choice is the verification model's."""
        return (self.rank[:, :1] == 0.0).to(self.logs.dtype)

    def features(self) -> Tensor:
        """(N, len(FEATURE_NAMES)) float32, in the order of `FEATURE_NAMES`: what the detector sees."""
        return torch.cat((self.divergences(), self.places()), dim=1)

    def divergences(self) -> Tensor:
        """(N, DIVERGENCES), the first of the features."""
        raw = torch.exp(self.logs)
        p = torch.clamp(raw, EPSILON, 1.0)
        # Not a matrix product: its running sums in float32 lose the many small terms of a thousand classes.
        products = (p[:, :, None] * torch.log(p)[:, None]).sum(dim=3).flatten(1)
        mean = p.mean(dim=1)
        of_mean = (mean * torch.log(mean)).sum(dim=1, keepdim=True)
        apart = torch.abs(raw[:, 0] - raw[:, 1]).sum(dim=1, keepdim=True)
        return torch.matmul(torch.cat((products, of_mean, apart), dim=1), torch.tensor(_FROM_SUMS))

    def places(self) -> Tensor:
        """(N, F - DIVERGENCES), the rest of the features: what the re-classifier sees of the pair."""
        # The winner's log-probability, not its log-odds: 1 - p of a certain row is all rounding in float32,
        # and a score must not depend on the order of a sum. The margins tell certain rows apart.
        first = self.top[:, :, 0]
        margins = (self.top[:, :, :2] - self.top[:, :, 1:]).flatten(1)
        gaps = (self.other - _swap(self.top)[:, :, :1]).flatten(1)
        ratios = limit(torch.cat((first, margins, gaps), dim=1))
        # How much better the pair would fit were the claimed class and the verified one exchanged.
        exchange = ratios[:, 6:7] * ratios[:, 8:9]
        ranks = torch.log(self.rank + 1.0)
        return torch.cat((ranks, self.agreement, ratios, exchange), dim=1)

    def class_features(self) -> Tensor:
        """(N, K, CLASS_FEATURES): for both models a class's log-ratio to the first three, its place among the
        first two and its probability; and the log-ratio of the two. Log-ratios are divided by 5, so that all
        columns are of one size."""
        places = [self.logs - self.top[:, :, i : i + 1] for i in range(TOP)]
        # What an exchanged class stands out by: how unlike the two models see it.
        unlike = self.logs[:, :1] - self.logs[:, 1:]
        ratios = limit(torch.cat((*places, unlike), dim=1))
        leads = (ratios[:, :4] >= 0.0).to(ratios.dtype)
        return torch.cat((0.2 * ratios, leads, torch.exp(self.logs)), dim=1).transpose(1, 2)


def _swap(both: Tensor) -> Tensor:
    """The other model's values in each model's place, (N, 2, ...)."""
    return torch.index_select(both, 1, torch.tensor(_OTHER_WAY))


def limit(log_ratio: Tensor) -> Tensor:
    """Clip to +-`LOG_RATIO_LIMIT`."""
    return torch.clamp(log_ratio, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
