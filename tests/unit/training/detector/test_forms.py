"""No score hangs on how a service writes its answer: digits, floors, logarithms."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from fides_plugins.codec import OutputCodec
from fides_plugins.onnx_model import OnnxModel
from fides_plugins.statistics import divergences
from fides_plugins.training.attacks import default_registry
from fides_plugins.training.detector.detection import train_on
from fides_plugins.training.evaluation.synthetic import synthetic_pair
from fides_plugins.training.predictions import run_graph

#: A rewritten answer may move no score by more.
BOUND = 0.02

Answers = np.ndarray[tuple[int, ...], np.dtype[np.floating]]
Pair = tuple[Answers, Answers]

FORMS: dict[str, tuple[Callable[[Answers], Answers], OutputCodec]] = {
    "float16": (lambda p: p.astype(np.float16), OutputCodec("probabilities")),
    "six decimals": (lambda p: np.round(p.astype(np.float64), 6), OutputCodec("probabilities")),
    "floor 1e-7": (lambda p: np.maximum(p, 1e-7), OutputCodec("probabilities")),
    "floor 1e-6": (lambda p: np.maximum(p, 1e-6), OutputCodec("probabilities")),
    "log-probabilities in float16": (lambda p: np.log(np.maximum(p, 1e-38)).astype(np.float16), OutputCodec("logits")),
}


@pytest.fixture(scope="module", params=[(2, 6.0), (10, 6.0), (60, 0.4)], ids=["2 sure", "10 sure", "60 unsure"])
def scorers(
    request: pytest.FixtureRequest,
) -> tuple[dict[str, Callable[..., Answers]], dict[str, tuple[Answers, Answers]]]:
    """The learned detector and every divergence; benign and attacked pairs, none of which training saw."""
    k, scale = request.param
    rows = synthetic_pair(900, k, signal=3.5, service_scale=scale, with_labels=False)
    made = train_on(rows, attacks=("switch", "random"), false_alarm_rate=0.05)
    graph = OnnxModel(made.detector_onnx)
    scorers = {name: lambda s, v, n=name: divergences.score(n, s, v) for name in divergences.DIVERGENCES}
    scorers["learned"] = lambda s, v: run_graph(graph, "score", service=s, verification=v)
    new = synthetic_pair(2000, k, signal=3.5, service_scale=scale, seed=1)
    registry = default_registry()
    pairs = {"benign": (new.service, new.verification)}
    for name in registry.names("output"):
        lies, changed = registry.output(name).apply(new.service, np.random.default_rng(0))
        pairs[name] = (lies[changed], new.verification[changed])
    return scorers, pairs


@pytest.mark.parametrize("form", FORMS)
def test_a_rewritten_answer_keeps_its_score(scorers, form: str) -> None:  # type: ignore[no-untyped-def]
    write, codec = FORMS[form]
    for kind, (service, verification) in scorers[1].items():
        again = codec.read(write(service))
        # An answer that names another class, or two at once, is another answer.
        first, second = np.sort(again.probabilities, axis=1)[:, -2:].T[::-1]
        same = again.valid & (again.label == service.argmax(axis=1)) & (first > second)
        assert same.mean() > 0.5
        for name, score in scorers[0].items():
            moved = np.abs(score(again.probabilities, verification) - score(service, verification))[same]
            assert moved.max() <= BOUND, (kind, name)
