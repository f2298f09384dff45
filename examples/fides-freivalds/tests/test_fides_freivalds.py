import hashlib
from pathlib import Path

import numpy as np
import pytest
from fides_freivalds import NAME, POOL, Freivalds, LinearCheck

from fides_plugins import Prediction, Query, SettingsError
from fides_plugins.testing import check_plugin, memory_bundle, switch_top_two

D, K = 64, 10
RNG = np.random.default_rng(5)
WEIGHT = RNG.normal(0, 0.3, (D, K)).astype(np.float32)
BIAS = RNG.normal(0, 0.3, K).astype(np.float32)


@pytest.fixture
def weights(tmp_path):
    np.savez(tmp_path / "head.npz", weight=WEIGHT, bias=BIAS)
    return str(tmp_path / "head.npz")


def answer(x):
    return Prediction.from_output(x @ WEIGHT + BIAS, "logits")


def settings(weights, **options):
    blocked = ["detector", "verifier", "reclassifier"]
    return {"plugins": {"blocked": blocked, "options": {NAME: {"weights": weights, **options}}}}


class Anything:
    """Freivalds needs no reference, but the pipeline wants one: an uninformed verifier."""

    from fides_plugins import Verification, hookimpl

    @hookimpl
    def fides_verify(self, query):
        return self.Verification.single(np.full((query.n_rows, K), 1.0 / K), "nobody")


def run(pipeline, x, service, **more):
    """The verdict on rows `x`. The projections are secret and differ in every run: see `miss_bound`."""
    return pipeline.run(Query({"features": x, **more}), service)


def test_it_keeps_the_contract(tmp_path):
    for k in (2, 10, 1000):
        np.savez(tmp_path / "w.npz", weight=np.eye(k), bias=np.zeros(k))
        check_plugin(Freivalds, name=NAME, class_counts=(k,), options={"weights": str(tmp_path / "w.npz")})


def relative_change(x, lie):
    """(N,) |e| / |z| of a lie in the logits that its probabilities give away, both up to a constant per row."""
    z = np.log(answer(x).probabilities.astype(float))
    error = np.log(lie.probabilities.astype(float)) - z
    norms = [np.linalg.norm(part - part.mean(axis=1, keepdims=True), axis=1) for part in (error, z)]
    return norms[0] / norms[1]


def test_honest_answers_are_trusted_and_switched_ones_found(fides_pipeline, weights):
    x = np.random.default_rng(6).normal(0, 1, (500, D)).astype(np.float32)
    honest = answer(x)
    rows = list(range(0, 500, 3))
    lie = Prediction(switch_top_two(honest.probabilities, rows=rows), honest.valid)
    # The closest two classes of a row differ by little, and little may pass: with two repetitions one of
    # these rows does so in 1% of runs, with eight in none of 10^8.
    check = LinearCheck(WEIGHT.astype(float), BIAS.astype(float), repetitions=8, up_to_constant=True)
    assert check.miss_bound(relative_change(x, lie)[rows], 1e-4).sum() < 1e-8
    pipeline = fides_pipeline(
        Freivalds, Anything, mode="flag", **settings(weights, input="features", tolerance=1e-4, repetitions=8)
    )
    attacked = run(pipeline, x, lie).status == 1
    assert attacked[rows].all()
    assert attacked.sum() == len(rows)


def test_a_tiny_change_is_found_and_rounding_is_not(fides_pipeline, weights):
    x = RNG.normal(0, 1, (2000, D)).astype(np.float32)
    logits = x @ WEIGHT + BIAS
    logits[0, 3] += 0.05
    pipeline = fides_pipeline(Freivalds, Anything, mode="flag", **settings(weights, input="features", repetitions=4))
    verdict = run(pipeline, x, Prediction.from_output(logits, "logits"))
    assert verdict.status[0] == 1
    assert verdict.counts()["attacked"] == 1


def test_zero_probabilities_hide_nothing(fides_pipeline, weights):
    # Logits far apart: most probabilities are zero in float32, and their logits cannot be known.
    x = (RNG.normal(0, 1, (50, D)) * 60).astype(np.float32)
    honest = answer(x)
    assert (honest.probabilities == 0).any(axis=1).all()
    pipeline = fides_pipeline(Freivalds, Anything, mode="flag", **settings(weights, input="features"))
    assert run(pipeline, x, honest).counts()["attacked"] == 0
    lie = np.array(honest.probabilities)
    top = lie.argmax(axis=1)
    lie[np.arange(50), top] = 0
    lie[np.arange(50), (top + 1) % K] = 1
    lie /= lie.sum(axis=1, keepdims=True)
    assert run(pipeline, x, Prediction(lie, honest.valid)).counts()["attacked"] == 50


def test_claimed_activations_of_another_tensor(fides_pipeline, weights):
    x = RNG.normal(0, 1, (40, D)).astype(np.float32)
    hidden = x @ WEIGHT + BIAS
    hidden[7, 2] *= 1.01
    hidden[8, 2] = np.nan
    pipeline = fides_pipeline(
        Freivalds, Anything, mode="flag", **settings(weights, input="features", claimed="hidden", repetitions=6)
    )
    verdict = run(pipeline, x, answer(x), hidden=hidden)
    assert np.flatnonzero(verdict.status == 1).tolist() == [7, 8]


def test_without_the_tensors_there_is_no_opinion(fides_pipeline, weights, caplog):
    x = RNG.normal(0, 1, (4, D)).astype(np.float32)
    pipeline = fides_pipeline(Freivalds, Anything, mode="flag", **settings(weights, input="features", claimed="hidden"))
    verdict = run(pipeline, x, answer(x))
    assert verdict.counts()["indeterminate"] == 4
    assert "nothing is checked" in caplog.text


def test_the_miss_probability_is_the_stated_one():
    check = LinearCheck(WEIGHT.astype(float), BIAS.astype(float), repetitions=1)
    x = RNG.normal(0, 1, (1, D))
    z = x @ check.weight + check.bias
    error = np.zeros(K)
    error[0] = 0.02 * np.linalg.norm(z)
    tolerance = 1e-2
    bound = check.miss_bound(np.array([0.02]), tolerance)[0]
    missed = 0
    for _ in range(300):
        fresh = LinearCheck(WEIGHT.astype(float), BIAS.astype(float), repetitions=1)
        missed += sum(fresh.residual(x, z + error)[0] <= tolerance for _ in range(8))
    # P(|N(0, 0.02 |z|)| <= 0.01 |z|) = 0.383, below the stated bound sqrt(2/pi) / 2 = 0.399; five standard
    # errors of 2,400 draws are 0.05.
    assert abs(bound - 0.399) < 0.001
    assert 0.33 < missed / 2400 < 0.44


def test_no_projection_is_drawn_twice_for_a_request():
    # With as many repetitions as there are projections every one is used, so the largest is always among them.
    check = LinearCheck(WEIGHT.astype(float), BIAS.astype(float), repetitions=POOL)
    x = np.random.default_rng(7).normal(0, 1, (1, D))
    wrong = x @ check.weight + check.bias + 0.1
    assert len({float(check.residual(x, wrong)[0]) for _ in range(20)}) == 1


def test_weights_that_cannot_be_used_stop_the_start(fides_manager, weights, tmp_path):
    (tmp_path / "text.npz").write_text("no")
    np.savez(tmp_path / "thin.npz", weight=np.eye(3), bias=np.zeros(3))
    for options, text in [
        ({}, "no weights"),
        ({"weights": str(tmp_path / "none.npz")}, "cannot be read"),
        ({"weights": str(tmp_path / "text.npz")}, "no .npz"),
        ({"weights": str(tmp_path / "thin.npz")}, "3 classes"),
        ({"weights": weights, "sha256": "0" * 64}, "were changed"),
        ({"weights": weights, "repetitions": 0}, "repetitions is 0"),
        ({"weights": weights, "repetitions": 65}, "from 1 to 64"),
    ]:
        with pytest.raises(SettingsError, match=text):
            fides_manager(Freivalds, plugins={"options": {NAME: options}})
    digest = hashlib.sha256(Path(weights).read_bytes()).hexdigest()
    fides_manager(Freivalds, bundle=memory_bundle(K), **settings(weights, sha256=digest))
