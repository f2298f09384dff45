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
    "js",
    "total_variation",
    "entropy_service",
    "entropy_verification",
    "cross_entropy",
    "agreement",
    "service_rank_of_verified",
    "verification_rank_of_claimed",
    "service_top1",
    "service_margin12",
    "service_margin23",
    "verification_top1",
    "verification_margin12",
    "verification_margin23",
    "service_of_verified1",
    "service_of_verified2",
    "verification_of_claimed1",
    "verification_of_claimed2",
    "exchange_gain",
)
#: Columns of the per-class matrix, see `class_features`.
CLASS_FEATURES = 13


class Temper(nn.Module):
    """Probabilities (N, K) to tempered log-probabilities (N, K)."""

    scale: Tensor

    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(1.0 / temperature, dtype=torch.float32))

    def forward(self, probabilities: Tensor) -> Tensor:
        """log_softmax(log p / T)."""
        logs = torch.log(torch.clamp_min(probabilities, 1e-30))
        return functional.log_softmax(logs * self.scale, dim=1)


class Pair:
    """The tempered pair and what several features share, computed once.

    Parameters
    ----------
    service, verification:
        (N, K) tempered log-probabilities.
    """

    def __init__(self, service: Tensor, verification: Tensor) -> None:
        self.service, self.verification = service, verification
        pad = (0, max(0, TOP - 2))
        top_s = torch.topk(functional.pad(service, pad, value=LOG_PAD), TOP, dim=1)
        top_v = torch.topk(functional.pad(verification, pad, value=LOG_PAD), TOP, dim=1)
        self.top_service, self.top_verification = top_s.values, top_v.values
        # Only two are gathered, so that the padding's index is never used.
        self.service_of_verified = service.gather(1, top_v.indices[:, :2])
        self.verification_of_claimed = verification.gather(1, top_s.indices[:, :2])
        self.agreement = (top_s.indices[:, :1] == top_v.indices[:, :1]).to(service.dtype)

    def features(self) -> Tensor:
        """(N, len(FEATURE_NAMES)) float32, in the order of `FEATURE_NAMES`."""
        s = torch.clamp(torch.exp(self.service), EPSILON, 1.0)
        v = torch.clamp(torch.exp(self.verification), EPSILON, 1.0)
        ls, lv = torch.log(s), torch.log(v)
        mean = 0.5 * (s + v)
        log_mean = torch.log(mean)

        def total(x: Tensor) -> Tensor:
            return x.sum(dim=1, keepdim=True)

        entropy_s, entropy_v = -total(s * ls), -total(v * lv)
        cross = -total(s * lv)
        kl_reverse = -entropy_v - total(v * ls)
        js = 0.5 * (-entropy_s - entropy_v) - total(mean * log_mean)
        top_s, top_v = self.top_service, self.top_verification
        s_at_v, v_at_s = self.service_of_verified, self.verification_of_claimed
        rank_s = total((self.service > s_at_v[:, :1]).to(s.dtype))
        rank_v = total((self.verification > v_at_s[:, :1]).to(s.dtype))
        gap_s, gap_v = limit(s_at_v - top_s[:, :1]), limit(v_at_s - top_v[:, :1])
        return torch.cat(
            (
                cross - entropy_s,
                kl_reverse,
                js,
                0.5 * total(torch.abs(s - v)),
                entropy_s,
                entropy_v,
                cross,
                self.agreement,
                torch.log1p(rank_s),
                torch.log1p(rank_v),
                logit(top_s[:, :1]),
                limit(top_s[:, :2] - top_s[:, 1:]),
                logit(top_v[:, :1]),
                limit(top_v[:, :2] - top_v[:, 1:]),
                gap_s,
                gap_v,
                # How much better the pair would fit were the claimed class and the verified one exchanged.
                gap_s[:, :1] * gap_v[:, :1],
            ),
            dim=1,
        )

    def class_features(self) -> Tensor:
        """(N, K, CLASS_FEATURES): a class's log-ratio to the first three of both models, its place among the
        first two, and both probabilities. Log-ratios are divided by 5, so that all columns are of one size."""
        columns = []
        for logs, top in ((self.service, self.top_service), (self.verification, self.top_verification)):
            ratios = [limit(logs - top[:, i : i + 1]) for i in range(TOP)]
            columns += [ratio * 0.2 for ratio in ratios]
            columns += [(ratio >= 0.0).to(logs.dtype) for ratio in ratios[:2]]
            columns.append(torch.exp(logs))
        # How unlike the two models see the class: what an exchanged class stands out by.
        columns.append(limit(self.service - self.verification) * 0.2)
        return torch.stack(columns, dim=2)


def limit(log_ratio: Tensor) -> Tensor:
    """Clip to +-`LOG_RATIO_LIMIT`."""
    return torch.clamp(log_ratio, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def logit(log_p: Tensor) -> Tensor:
    """log(p / (1 - p)) of a log-probability, clipped; 1 - p is kept above 1e-7."""
    return limit(log_p - torch.log(torch.clamp_min(1.0 - torch.exp(log_p), 1e-7)))
