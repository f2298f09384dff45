"""What detector and re-classifier see of a pair of answers. Part of the exported graphs.

Both work on *scaled* log-probabilities: log p / T, normalised again, with one temperature for each model (temperature
scaling; Guo et al., "On Calibration of Modern Neural Networks", ICML 2017). Distilled and fine-tuned networks are often
certain to many digits; in float32 probabilities the digits are still there, and a temperature brings them back to a
scale on which certainty tells how likely the two are to agree.

How the service writes its answer must not matter: as float16, with six decimals, or with a floor of its own. So its
probabilities are raised by `SERVICE_FLOOR` before a logarithm is taken, and its classes enter by how likely they are,
not by their order, which is chance among classes that are equally near nothing. The verification model's answer comes
from the bundle's own graph in float32, and is used to its last digit.

No feature depends on the number or on the order of the classes' columns, so one network serves any K.
The divergences are those of `fides_plugins.statistics.divergences`; a test holds the two to 1e-5 of each other.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from fides_plugins.statistics.divergences import EPSILON, SERVICE_FLOOR

#: Stands for a class that is not there; below every scaled log-probability.
LOG_PAD = -1e4
#: Added to the probabilities of the service and of the verification model.
FLOORS = (SERVICE_FLOOR, 1e-30)
#: Log-ratios are clipped here before they enter a network.
LOG_RATIO_LIMIT = 20.0
#: The highest classes looked at one by one. A K of 2 is padded.
TOP = 3

FEATURE_NAMES: tuple[str, ...] = (
    "kl_unscaled",
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
    "verification_of_other_claims",
    "service_of_verified1",
    "service_of_other_verified",
    "exchange_gain",
)
#: So many of them, from the first on, are KL.
KLS = 2
#: So many of them are divergences; the others say how the classes are placed.
DIVERGENCES = 8
#: Columns of the per-class matrix, see `Pair.class_features`.
CLASS_FEATURES = 16

# Rows of probabilities: the scaled s and v, s and v as they came, and the mean of the scaled two. Which one is
# multiplied with whose logarithm, summed over the classes:
_PROBABILITY_OF = (0, 0, 1, 1, 2, 2, 4)
_LOGARITHM_OF = (0, 1, 0, 1, 2, 3, 4)
# The divergences from these sums and, last, the sum of the smaller of the scaled s and v; and what is added.
_FROM_SUMS = (
    (0.0, 1.0, 0.0, -1.0, 0.0, 0.0, 0.5, 0.0),
    (0.0, -1.0, 0.0, 0.0, 0.0, -1.0, 0.0, 0.0),
    (0.0, 0.0, -1.0, 0.0, 0.0, 0.0, 0.0, 0.0),
    (0.0, 0.0, 1.0, 0.0, -1.0, 0.0, 0.5, 0.0),
    (1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0),
    (-1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0),
    (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0, 0.0),
    (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0),
)
_ADDED = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0)
# Columns: each model's first three log-probabilities and the other's at its first and others, the service's before the
# verification model's. To: the first, the two margins, and how far the other's stay below the other's own first.
_FROM_TOP = (
    (1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0, -1.0),
    (0.0, 0.0, -1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0),
    (0.0, 0.0, 0.0, -1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0),
    (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0),
    (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0),
    (0.0, 1.0, 0.0, 0.0, 1.0, 0.0, -1.0, -1.0, 0.0, 0.0),
    (0.0, 0.0, 0.0, 0.0, -1.0, 1.0, 0.0, 0.0, 0.0, 0.0),
    (0.0, 0.0, 0.0, 0.0, 0.0, -1.0, 0.0, 0.0, 0.0, 0.0),
    (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0),
    (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0),
)
_OTHER_WAY = (1, 0)


class TemperatureScaling(nn.Module):
    """Probabilities (N, 2, K), the service's and the verification model's, to scaled log-probabilities."""

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

    def forward(self, both: Tensor) -> Tensor:
        """log_softmax(log(p + floor) / T)."""
        return functional.log_softmax(torch.log(both + torch.tensor(FLOORS)[:, None]) * self.scale, dim=2)


class Pair:
    """The scaled pair and what several features share, computed once.

    Both models are worked on side by side in one tensor, and what is linear is one product with a constant: a graph
    for single rows costs what its number of operations costs, not what they compute.

    Parameters
    ----------
    scaling:
        With the temperatures of the two models.
    service, verification:
        (N, K) probabilities.
    """

    def __init__(self, scaling: TemperatureScaling, service: Tensor, verification: Tensor) -> None:
        self.unscaled = torch.stack((service, verification), dim=1)
        self.logs = logs = scaling(self.unscaled)
        top = torch.topk(functional.pad(logs, (0, max(0, TOP - 2)), value=LOG_PAD), TOP, dim=2)
        self.top = top.values
        crossed = _pick(logs, _OTHER_WAY)
        # What the other model thinks of this one's choice, and of its other classes on average, weighted by this one.
        chosen = crossed.gather(2, top.indices[:, :, :1])
        others = torch.softmax(logs + LOG_PAD * (logs >= self.top[:, :, :1]).to(logs.dtype), dim=2)
        self.other = torch.cat((chosen, (others * crossed).sum(dim=2, keepdim=True)), dim=2)
        # Classes that the other model finds likelier than this one's choice, each counted by how much likelier: 1 minus
        # the ratio. 0: the same choice (or a tie).
        self.rank = torch.clamp_min(1.0 - torch.exp(chosen - crossed), 0.0).sum(dim=2)
        self.agrees = self.rank[:, :1] == 0.0

    @property
    def agreement(self) -> Tensor:
        """(N, 1) float: 1 where the service's choice is the verification model's."""
        return self.agrees.to(self.logs.dtype)

    def features(self) -> Tensor:
        """(N, len(FEATURE_NAMES)) float32, in the order of `FEATURE_NAMES`: what the detector sees."""
        return torch.cat((self.divergences(), *self._places()), dim=1)

    def divergences(self) -> Tensor:
        """(N, DIVERGENCES), the first of the features."""
        scaled = torch.exp(self.logs)
        p = torch.clamp(torch.cat((scaled, self.unscaled), dim=1), EPSILON, 1.0)
        p = torch.cat((p, p[:, :2].mean(dim=1, keepdim=True)), dim=1)
        # Not a matrix product: its running sums in float32 lose the many small terms of a thousand classes.
        products = _pick(p, _PROBABILITY_OF) * _pick(torch.log(p), _LOGARITHM_OF)
        sums = torch.cat((products, scaled.amin(dim=1, keepdim=True)), dim=1).sum(dim=2)
        return torch.addmm(torch.tensor(_ADDED), sums, torch.tensor(_FROM_SUMS))

    def places(self) -> Tensor:
        """(N, F - DIVERGENCES), the rest of the features: what the re-classifier sees of the pair."""
        return torch.cat(self._places(), dim=1)

    def _places(self) -> tuple[Tensor, ...]:
        # The winner's log-probability, not its log-odds: 1 - p of a certain row is all rounding in float32,
        # and a score must not depend on the order of a sum. The margins tell certain rows apart.
        seen = torch.cat((self.top, self.other), dim=2).flatten(1)
        ratios = limit(torch.matmul(seen, torch.tensor(_FROM_TOP)))
        # How much better the pair would fit were the claimed class and the verified one exchanged.
        exchange = ratios[:, 6:7] * ratios[:, 8:9]
        return torch.log(self.rank + 1.0), self.agreement, ratios, exchange

    def class_features(self) -> Tensor:
        """(N, K, CLASS_FEATURES): for both models a class's log-ratio to each of the first three, the log-ratio of
        the two models, whether each of these is at least 0, and both probabilities. Log-ratios are divided by 5, so
        that all columns are of one size."""
        places = _pick(self.logs, (0,) * TOP + (1,) * TOP) - self.top.flatten(1)[:, :, None]
        # What an exchanged class stands out by: how unlike the two models see it.
        unlike = self.logs[:, :1] - self.logs[:, 1:]
        ratios = limit(torch.cat((places, unlike), dim=1))
        above = (ratios >= 0.0).to(ratios.dtype)
        return torch.cat((0.2 * ratios, above, torch.exp(self.logs)), dim=1).transpose(1, 2)


def _pick(rows: Tensor, which: tuple[int, ...]) -> Tensor:
    """These of (N, rows, ...)."""
    return torch.index_select(rows, 1, torch.tensor(which))


def limit(log_ratio: Tensor) -> Tensor:
    """Clip to +-`LOG_RATIO_LIMIT`."""
    return torch.clamp(log_ratio, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
