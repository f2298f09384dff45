"""The trained networks: features against `divergences.py`, any K, order of classes, size, speed, what they learn."""

from __future__ import annotations

import time

import numpy as np
import onnx
import pytest
import torch

from fides_plugins.onnx_model import OnnxModel
from fides_plugins.statistics import divergences
from fides_plugins.training.attacks import default_registry
from fides_plugins.training.detector.adversarial import GanOptions, by_precedence, close_to_least, train_gan
from fides_plugins.training.detector.detection import DetectionArtifacts, train_on
from fides_plugins.training.detector.features import FEATURE_NAMES, FLOORS, Pair, TemperatureScaling
from fides_plugins.training.detector.networks import Detector, DetectorGraph, export
from fides_plugins.training.detector.pools import Pools
from fides_plugins.training.evaluation.synthetic import synthetic_pair

TEMPERATURES = (1.7, 4.0)
#: Time of the CI machine is shared; the targets (150 us, 1 ms) are checked in benchmarks with nothing beside.
SLACK = 8.0


@pytest.fixture(scope="module")
def artifacts() -> DetectionArtifacts:
    rows = synthetic_pair(1500, 6, signal=3.5)
    return train_on(rows, seed=3)


def feeds(n: int, k: int, seed: int = 0) -> dict[str, np.ndarray]:
    rows = synthetic_pair(n, k, seed=seed)
    return {"service": rows.service.copy(), "verification": rows.verification.copy()}


class _Features(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scaling = TemperatureScaling(*TEMPERATURES)

    def forward(self, service: torch.Tensor, verification: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        pair = Pair(self.scaling, service, verification)
        return pair.features(), torch.exp(pair.logs)


@pytest.mark.parametrize("k", [2, 3, 10, 100, 1000])
def test_features_in_the_graph_are_those_of_divergences(k: int):
    """The exported graph in float32 beside numpy in float64, on the distributions it compares, to 1e-5."""
    graph = OnnxModel(export(_Features(), ("service", "verification"), ("features", "scaled")))
    pair = feeds(200, k)
    pair["service"][:5] = np.eye(k, dtype=np.float32)[0]  # certain to the last bit
    answer = graph.run(pair)
    found = dict(zip(FEATURE_NAMES, answer["features"].T, strict=True))
    s, v = answer["scaled"][:, 0], answer["scaled"][:, 1]
    for name, mine, temperature, floor in zip(pair, (s, v), TEMPERATURES, FLOORS, strict=True):
        powers = (pair[name].astype(np.float64) + floor) ** (1 / temperature)
        np.testing.assert_allclose(mine, powers / powers.sum(axis=1, keepdims=True), rtol=1e-4, atol=1e-12)
    wanted = {name: divergences.divergence(name)(s, v) for name in ("kl", "js", "total_variation")}
    # Under s lies the service's floor already.
    wanted["kl_reverse"] = divergences.kl(v, s)
    wanted["kl_unscaled"] = divergences.kl(pair["service"], pair["verification"])
    wanted["cross_entropy"] = divergences.cross_entropy(s, v)
    wanted["entropy_service"], wanted["entropy_verification"] = divergences.entropy(s), divergences.entropy(v)
    wanted["agreement"] = (s.argmax(axis=1) == v.argmax(axis=1)).astype(np.float64)
    for name, values in wanted.items():
        # float32 holds seven digits: to 1e-5 of the value where it is above one.
        np.testing.assert_allclose(found[name], values, atol=1e-5, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("k", [2, 3, 6, 50, 1000])
@pytest.mark.parametrize("n", [1, 64])
def test_one_graph_takes_any_number_of_rows_and_classes(artifacts: DetectionArtifacts, n: int, k: int):
    pair = feeds(n, k)
    score = OnnxModel(artifacts.detector_onnx).run(pair)["score"]
    assert score.shape == (n,)
    assert ((score > 0) & (score < 1)).all()
    for name, values in OnnxModel(artifacts.reclassifier_onnx).run(pair).items():
        assert values.shape == (n, k), name
        np.testing.assert_allclose(values.sum(axis=1), 1.0, atol=1e-4)


def test_the_order_of_the_classes_means_nothing(artifacts: DetectionArtifacts):
    pair = feeds(100, 9)
    order = np.random.default_rng(0).permutation(9)
    turned = {name: np.ascontiguousarray(p[:, order]) for name, p in pair.items()}
    detector, reclassifier = OnnxModel(artifacts.detector_onnx), OnnxModel(artifacts.reclassifier_onnx)
    np.testing.assert_allclose(detector.run(turned)["score"], detector.run(pair)["score"], atol=1e-5)
    for name, values in reclassifier.run(pair).items():
        np.testing.assert_allclose(reclassifier.run(turned)[name], values[:, order], atol=1e-5)


def test_it_tells_lies_from_honest_rows_and_recovers_the_answer(artifacts: DetectionArtifacts):
    """Beside plain disagreement, in the mean over three trainings: one alone moves by two points with its seed."""
    fitted, rows = synthetic_pair(1500, 6, signal=3.5), synthetic_pair(2000, 6, signal=3.5, seed=9)
    more = [train_on(fitted, seed=seed) for seed in (4, 5)]
    own = rows.service.argmax(axis=1)
    for name in ("switch", "random"):
        lies, _ = default_registry().output(name).apply(rows.service, np.random.default_rng(0))
        pair = {"service": lies, "verification": rows.verification}
        rule = 0.5 * (rows.agreement + (lies.argmax(axis=1) != rows.verification.argmax(axis=1)).mean())
        ahead = []
        for made in (artifacts, *more):
            detector, reclassifier = OnnxModel(made.detector_onnx), OnnxModel(made.reclassifier_onnx)
            honest = detector.run({"service": rows.service, "verification": rows.verification})["score"]
            right = 0.5 * ((honest <= 0.5).mean() + (detector.run(pair)["score"] > 0.5).mean())
            ahead.append(right - rule)
            recovered = (reclassifier.run(pair)["probabilities"].argmax(axis=1) == own).mean()
            assert recovered > 0.9
        assert np.mean(ahead) > -0.015


def test_the_generator_always_changes_the_class(artifacts: DetectionArtifacts):
    assert artifacts.generator_onnx is not None
    generator = OnnxModel(artifacts.generator_onnx)
    for k in (2, 6, 200):
        service = feeds(300, k)["service"]
        noise = np.random.default_rng(0).standard_normal(service.shape, dtype=np.float32)
        attacked = generator.run({"service": service, "noise": noise})["attacked"]
        assert (attacked.argmax(axis=1) != service.argmax(axis=1)).all()
        np.testing.assert_allclose(attacked.sum(axis=1), 1.0, atol=1e-4)


def test_a_seed_repeats_and_another_one_does_not():
    rows = synthetic_pair(300, 4)
    attacks = [default_registry().output("switch")]
    options = GanOptions(rounds=2, steps=5, generator_steps=2)

    def weights(seed: int) -> np.ndarray:
        networks = train_gan(rows, attacks, seed, options)
        return np.concatenate([p.detach().numpy().ravel() for p in networks.detector.parameters()])

    state = torch.random.get_rng_state()
    np.testing.assert_array_equal(weights(1), weights(1))
    assert not np.array_equal(weights(1), weights(2))
    assert torch.equal(state, torch.random.get_rng_state())


def test_the_merged_network_is_the_mean_of_its_members():
    sample = torch.randn(50, len(FEATURE_NAMES), generator=torch.Generator().manual_seed(0))
    detector = Detector(sample, 4).eval()
    torch.testing.assert_close(detector.merged()(sample), detector.logits(sample), atol=1e-5, rtol=1e-5)
    graph = DetectorGraph(TemperatureScaling(1.0, 1.0), detector, 0.0)
    pair = feeds(20, 5)
    score = OnnxModel(export(graph, ("service", "verification"), ("score",))).run(pair)["score"]
    with torch.no_grad():
        np.testing.assert_allclose(score, graph(*map(torch.from_numpy, pair.values())).numpy(), atol=1e-5)


def test_without_labels_the_truth_is_the_scaled_reference():
    rows = synthetic_pair(600, 4, with_labels=False)
    made = train_on(rows, attacks=("switch",))
    truth = OnnxModel(made.reclassifier_onnx).run(feeds(50, 4))["truth"]
    np.testing.assert_array_equal(truth.argmax(axis=1), feeds(50, 4)["verification"].argmax(axis=1))
    assert made.provenance["labels"] is False
    assert made.generator_onnx is None
    assert set(made.files()) == {"detector.onnx", "reclassifier.onnx", "calibration.json"}


def test_the_graphs_are_small_quick_and_hold_no_paths(artifacts: DetectionArtifacts):
    graphs = (artifacts.detector_onnx, artifacts.reclassifier_onnx)
    assert sum(map(len, graphs)) < 200_000
    for data in graphs:
        model = onnx.load_from_string(data)
        assert not any(n.doc_string or len(n.metadata_props) for n in model.graph.node)
        assert b"site-packages" not in data
        assert b".py" not in data
    models = [OnnxModel(data, threads=1) for data in graphs]
    for n, limit in ((1, 150e-6), (64, 1e-3)):
        pair = feeds(n, 10)
        times = []
        for _ in range(300):
            began = time.perf_counter()
            for model in models:
                model.run(pair)
            times.append(time.perf_counter() - began)
        assert np.quantile(times, 0.1) < SLACK * limit


@pytest.mark.parametrize(
    ("names", "replays"),
    [
        (("switch", "confidence"), set()),
        (("switch", "random"), {"replay-alike"}),
        (("confidence",), {"replay", "replay-near", "replay-like"}),
        ((), {"replay", "replay-near", "replay-like", "replay-alike"}),
    ],
)
def test_replays_have_the_first_say_only_where_no_named_attack_is_like_them(names: tuple[str, ...], replays: set[str]):
    rows = synthetic_pair(300, 6, signal=3.5)
    registry = default_registry()
    attacks = [registry.output(name) for name in names]
    pools = Pools(rows, attacks, TemperatureScaling(*TEMPERATURES), 4, np.random.default_rng(0), 1.0, 32).attacked(None)
    first, then = by_precedence(pools)
    assert {pool.name for pool in first} == set(names) | replays
    assert {pool.name for pool in then} == {"replay", "replay-near", "replay-like", "replay-alike"} - replays


def test_what_cannot_be_told_from_the_least_regret_is_left():
    assert close_to_least([0.1, 0.2, 0.3, 0.4], [0.5, 0.02, -0.01, 0.02], apart=0.035) == [0.2, 0.3, 0.4]
