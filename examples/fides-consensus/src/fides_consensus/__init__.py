"""Asks replicas of the service and votes; names the one that is outvoted.

The replicas are endpoints of the Open Inference Protocol that run the same model on other machines, best
under other operators. Their majority becomes a reference; the service is attacked where it differs from
it. A replica that lies is outvoted, counted and logged by name, and changes nothing.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from fides_plugins import Detection, FidesError, Prediction, Query, SettingsError, Verification, hookimpl
from fides_plugins.client.oip import OipModel

if TYPE_CHECKING:
    from fides_plugins.bundle import Bundle
    from fides_plugins.settings import Settings
    from fides_plugins.types import OutputKind

NAME = "consensus"
logger = logging.getLogger("fides_consensus")


@dataclass(frozen=True)
class Vote:
    """Outcome of a vote among R replicas on N rows.

    Attributes
    ----------
    reference:
        (N, K) mean of the majority's answers.
    decided:
        (N,) bool: more than half of all replicas agree, silent ones included in the count.
    outvoted:
        (R, N) bool: the replica answered a decided row differently.
    """

    reference: NDArray[np.float32]
    decided: NDArray[np.bool_]
    outvoted: NDArray[np.bool_]


def vote(answers: NDArray[np.float32], answered: NDArray[np.bool_], tolerance: float) -> Vote:
    """Find the majority of each row.

    Parameters
    ----------
    answers:
        (R, N, K) distributions.
    answered:
        (R, N) bool.
    tolerance:
        Two replicas agree when the total variation between their answers is at most this.
    """
    replicas, rows, _ = answers.shape
    agree = np.zeros((replicas, replicas, rows), dtype=np.bool_)
    for i in range(replicas):
        # A loop over replicas (few), not rows: the pairwise array would be (R, R, N, K).
        distance = 0.5 * np.abs(answers - answers[i]).sum(axis=2)
        agree[i] = (distance <= tolerance) & answered & answered[i]
    votes = agree.sum(axis=1)
    leader = votes.argmax(axis=0)
    columns = np.arange(rows)
    decided = 2 * votes[leader, columns] > replicas
    members = agree[leader, :, columns].T & decided
    weight = members[..., None].astype(np.float32)
    total = (answers * weight).sum(axis=0) / np.maximum(weight.sum(axis=0), 1)
    uniform = np.float32(1.0 / answers.shape[2])
    reference = np.where(decided[:, None], total, uniform).astype(np.float32)
    return Vote(reference, decided, answered & decided & ~members)


class Consensus:
    """Options: `replicas` (addresses), `output`, `tolerance`, `timeout_ms`.

    Attributes
    ----------
    outvoted:
        Rows in which each replica was outvoted, by its name, since start.
    silent:
        Calls that each replica did not answer.
    """

    def __init__(self) -> None:
        self.outvoted: Counter[str] = Counter()
        self.silent: Counter[str] = Counter()
        self._replicas: dict[str, OipModel] = {}
        self._output = ""
        self._tolerance = 0.05
        self._kind: OutputKind = "logits"
        self._temperature = 1.0
        self._pool: ThreadPoolExecutor | None = None

    @hookimpl
    def fides_configure(self, settings: Settings, bundle: Bundle | None) -> None:
        """Read the options; at least three replicas, because two cannot outvote anybody."""
        options = settings.plugins.options.get(NAME, {})
        timeout_s = float(options.get("timeout_ms", 0.8 * settings.timeout_ms)) / 1000.0
        addresses = _addresses(options.get("replicas", ()))
        self._replicas = {name: OipModel(url, timeout_s) for name, url in addresses.items()}
        if len(self._replicas) < 3:
            raise SettingsError(
                f"{NAME} needs at least three replicas to find a majority; it has {len(self._replicas)}.",
                "Set plugins.options.consensus.replicas to their addresses: http://host:port/v2/models/NAME.",
            )
        self._output = str(options.get("output", settings.output))
        self._tolerance = float(options.get("tolerance", self._tolerance))
        if bundle is not None:
            self._kind = settings.output_kind or bundle.manifest.service.output_kind
            self._temperature = bundle.manifest.service.temperature
        # Several requests at once each ask every replica.
        self._pool = ThreadPoolExecutor(4 * len(self._replicas), thread_name_prefix=NAME)

    @hookimpl
    def fides_unconfigure(self) -> None:
        """Let the pool go."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    @hookimpl
    def fides_verify(self, query: Query) -> Verification | None:
        """The majority's answer, (N, K), for the rows that have one."""
        if self._pool is None or not query.n_rows:
            return None
        names = list(self._replicas)
        predictions = list(self._pool.map(lambda name: self._ask(name, query), names))
        classes = Counter(p.n_classes for p in predictions if p is not None)
        if not classes:
            raise RuntimeError("no replica answered")
        k = classes.most_common(1)[0][0]
        answers = np.full((len(names), query.n_rows, k), 1.0 / k, dtype=np.float32)
        answered = np.zeros((len(names), query.n_rows), dtype=np.bool_)
        for index, prediction in enumerate(predictions):
            if prediction is not None and prediction.probabilities.shape == answers[index].shape:
                answers[index], answered[index] = prediction.probabilities, prediction.valid
        outcome = vote(answers, answered, self._tolerance)
        losers = {n: int(c) for n, c in zip(names, outcome.outvoted.sum(axis=1), strict=True) if c}
        if losers:
            self.outvoted.update(losers)
            logger.warning("outvoted: %s", ", ".join(f"{n} in {c} row(s)" for n, c in losers.items()))
        source = f"{NAME}, outvoting {' and '.join(sorted(losers))}" if losers else NAME
        evidence = {"replicas": names, "outvoted": losers}
        return Verification.single(outcome.reference, source, available=outcome.decided, evidence=evidence)

    @hookimpl
    def fides_detect(self, service: Prediction, verification: Verification) -> Detection | None:
        """Attacked where the service differs from the majority; no opinion where there is none."""
        index = next((i for i, s in enumerate(verification.sources) if s.split(",")[0] == NAME), None)
        if index is None:
            return None
        distance = 0.5 * np.abs(service.probabilities - verification.references[:, index]).sum(axis=1)
        return Detection(
            np.clip(distance, 0.0, 1.0),
            attacked=distance > self._tolerance,
            source=verification.sources[index],
            valid=verification.available[:, index],
        )

    def _ask(self, name: str, query: Query) -> Prediction | None:
        try:
            output = self._replicas[name].infer(query.inputs, self._output)
            return Prediction.from_output(output.reshape(query.n_rows, -1), self._kind, self._temperature)
        except (FidesError, ValueError) as error:
            self.silent[name] += 1
            logger.warning("replica %s gave no vote: %s", name, error)
            return None


def _addresses(value: Any) -> dict[str, str]:
    """Name to address. Given as a mapping, a list, or one text with commas; `name=address` names one."""
    if isinstance(value, Mapping):
        return {str(k): str(v) for k, v in value.items()}
    items: Sequence[str] = value.split(",") if isinstance(value, str) else value
    result = {}
    for item in (i.strip() for i in items):
        name, separator, url = item.partition("=")
        if not separator or "://" in name:
            parts = urlsplit(item)
            name, url = f"{parts.netloc}{parts.path.replace('/v2/models', '')}", item
        if item:
            result[name.strip()] = url.strip()
    return result
