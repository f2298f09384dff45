"""Distillation and the greedy search."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from fides_plugins.errors import TrainingError
from fides_plugins.training.distil.augmentation import Augmentation, augment
from fides_plugins.training.distil.distillation import (
    DistillationSettings,
    TransferSet,
    agreement,
    distil,
    distillation_loss,
    predict,
    training_mode,
)
from fides_plugins.training.distil.gdtl import Search, certain, divergence, layer_groups
from fides_plugins.training.distil.pretrained import PretrainedNetwork
from fides_plugins.training.distil.students import Student

RNG = np.random.default_rng(0)
CENTRES = RNG.normal(0, 1.5, (3, 6)).astype(np.float32)


def problem(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows (n, 6) around three centres, and a teacher's logits."""
    rng = np.random.default_rng(seed)
    x = CENTRES[rng.integers(3, size=n)] + rng.normal(0, 0.6, (n, 6)).astype(np.float32)
    x = x.astype(np.float32)
    return x, (x @ CENTRES.T - 0.5 * (CENTRES**2).sum(1)).astype(np.float32)


LONGER = DistillationSettings(epochs=15, batch_size=32, learning_rate=1e-2, fine_tune_learning_rate=1e-2)


def transfer(n: int = 400) -> TransferSet:
    x, z = problem(n, 1)
    return TransferSet(x, z, np.full(n, -1, np.int64))


def test_loss_is_the_published_one() -> None:
    s, v = torch.randn(5, 4), torch.randn(5, 4)
    y = torch.tensor([0, 3, -1, 2, -1])
    t, alpha, beta = 5.0, 0.8, 0.2
    p, q = (s / t).softmax(1), (v / t).softmax(1)
    soft = alpha * t**2 * -(p * q.log()).sum(1).mean()
    hard = beta * functional.cross_entropy(v[[0, 1, 3]], y[[0, 1, 3]]) * 3 / 5
    assert distillation_loss(v, s, y, DistillationSettings()).item() == pytest.approx((soft + hard).item(), rel=1e-5)
    free = distillation_loss(v, s, torch.full((5,), -1), DistillationSettings())
    assert free.item() == pytest.approx(soft.item(), rel=1e-5)


@pytest.mark.parametrize("shape", [(1, 8, 8), (8, 8, 3), (8, 8), (12,)])
@pytest.mark.parametrize("dtype", [np.float32, np.uint8])
def test_copies_keep_shape_dtype_and_range(shape: tuple[int, ...], dtype: type) -> None:
    x = (RNG.random((7, *shape)) * 200).astype(dtype)
    labels = np.arange(7)
    shown, answers, origins = augment(x, labels, 3, 0)
    assert shown.shape == (28, *shape)
    assert shown.dtype == dtype
    assert np.array_equal(shown[:7], x)
    assert shown.min() >= x.min()
    assert shown.max() <= x.max()
    assert not np.array_equal(shown[7:14], x)
    assert set(np.unique(answers)) <= set(range(-1, 7))
    again, _, _ = augment(x, labels, 3, 0)
    assert np.array_equal(shown, again)
    assert np.array_equal(origins[:, 0], np.tile(np.arange(7), 4))
    assert np.array_equal(answers == -1, origins[:, 0] != origins[:, 1])


def test_blends_have_no_label() -> None:
    x = RNG.random((50, 4)).astype(np.float32)
    _, answers, origins = augment(x, np.zeros(50, np.int64), 1, 0, Augmentation(mix=1.0))
    blended = origins[:, 0] != origins[:, 1]
    assert blended[50:].mean() > 0.9  # a row may draw itself
    assert np.array_equal(answers == -1, blended)
    _, answers, _ = augment(x, np.zeros(50, np.int64), 1, 0, Augmentation(mix=0.0))
    assert (answers == 0).all()


def test_no_change_without_strength() -> None:
    x = RNG.random((4, 1, 9, 9)).astype(np.float32)
    shown, _, _ = augment(x, None, 1, 0, Augmentation(degrees=0, scale=0, shift=0, noise=0, mix=0))
    assert np.allclose(shown[4:], x, atol=1e-5)


def test_distillation_repeats_and_leaves_the_generator_alone() -> None:
    rows = transfer()

    def trained() -> np.ndarray:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, 3))
        distil(net, torch.from_numpy(rows.images), rows, DistillationSettings(batch_size=32), 1e-2, 8, 7)
        return predict(net, rows.images)

    state = torch.random.get_rng_state()
    first, again = trained(), trained()
    assert np.array_equal(first, again)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert agreement(first, rows.logits) > 0.8


def test_frozen_batch_norms_stay_frozen() -> None:
    net = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.BatchNorm1d(4))
    for parameter in net[1].parameters():
        parameter.requires_grad_(False)
    training_mode(net)
    assert not net[1].training
    assert net[3].training


def mlp(width: int) -> Student:
    return Student(f"mlp-{width}", lambda: nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 3)))


def test_cheapest_sufficient_student_wins() -> None:
    x, z = problem(600, 2)
    result = Search(transfer(), x, z, agreement=0.9, distillation=LONGER).run([mlp(64), mlp(16), mlp(256)])
    assert result.reached
    assert result.student == "mlp-16"
    assert [s.student for s in result.steps] == ["mlp-16"]
    assert result.agreement == pytest.approx(agreement(predict(result.model, x), z))


def test_larger_student_only_when_needed_and_limits_hold() -> None:
    x, z = problem(600, 2)
    small = Student("blind", lambda: nn.Sequential(nn.Linear(6, 1), nn.Linear(1, 3)))
    search = Search(transfer(), x, z, agreement=0.97, distillation=LONGER)
    result = search.run([mlp(512), mlp(32), small], max_parameters=1000)
    assert [s.student for s in result.steps] == ["blind", "mlp-32"]
    assert result.student == "mlp-32"
    assert result.cost.parameters <= 1000


def test_nothing_within_the_limits() -> None:
    x, z = problem(20, 2)
    with pytest.raises(TrainingError, match="at most 10 parameters"):
        Search(transfer(), x, z).run([mlp(8)], max_parameters=10)


def test_few_held_out_rows_take_the_dearest() -> None:
    x, z = problem(20, 2)
    result = Search(transfer(), x, z, agreement=0.99).run([mlp(8), mlp(32)])
    assert [s.student for s in result.steps] == ["mlp-32"]


def test_certainty_is_wilsons_lower_end() -> None:
    assert certain(1.0, 99, 0.99)
    assert not certain(1.0, 98, 0.99)
    assert certain(0.98, 10_000, 0.978)
    assert not certain(0.98, 100, 0.978)


def test_divergence_is_zero_for_equals_only() -> None:
    z = RNG.normal(size=(9, 4)).astype(np.float32)
    assert divergence(z, z + 3) == pytest.approx(0.0, abs=1e-6)
    assert divergence(z, -z) > 0.1


def pretrained(good: bool) -> Student:
    """A backbone that is useful as it is, or one whose layers must move."""

    def build() -> nn.Module:
        backbone = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU())
        if not good:
            with torch.no_grad():
                backbone[3].weight.mul_(0.0)  # type: ignore[union-attr, operator]
        return PretrainedNetwork(backbone, 16, 3)

    return Student("pretrained", build)


def test_greedy_stops_when_the_head_is_enough() -> None:
    x, z = problem(600, 2)
    result = Search(transfer(), x, z, agreement=0.85, distillation=LONGER).run([pretrained(True)])
    assert [s.action for s in result.steps] == ["fresh head"]
    assert result.reached


def test_greedy_unfreezes_while_it_pays_and_undoes_what_does_not() -> None:
    x, z = problem(600, 2)
    search = Search(transfer(), x, z, agreement=0.999, tolerance=0.002, distillation=LONGER)
    result = search.run([pretrained(False)])
    steps = result.steps
    assert steps[0].action == "fresh head"
    # A dead layer under the head: nothing can be told apart until it is unfrozen.
    assert steps[0].agreement < 0.6
    assert steps[1].kept
    assert result.agreement > 0.9
    assert steps[1].trainable > steps[0].trainable
    best = max(s.agreement for s in steps if s.kept)
    assert agreement(predict(result.model, x), z) == pytest.approx(best)
    kept = [s.agreement for s in steps if s.kept]
    assert all(b > a + 0.002 for a, b in zip(kept, kept[1:]))  # noqa: B905, RUF007


def test_backbone_batch_norms_never_move() -> None:
    x, z = problem(600, 2)
    student = pretrained(True)
    before = student.model(transfer().images, 0).network.backbone[1].state_dict()  # type: ignore[index, union-attr, operator]
    result = Search(transfer(), x, z, agreement=1.0, tolerance=-1.0).run([student])
    after = result.model.network.backbone[1].state_dict()  # type: ignore[index, union-attr, operator]
    assert len(result.steps) > 2
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_groups_begin_at_the_output() -> None:
    net = nn.Sequential(*[nn.Linear(2, 2) for _ in range(7)], nn.BatchNorm1d(2))
    groups = layer_groups(net, 3)
    assert [len(g) for g in groups] == [2, 3, 2]
    assert groups[0][0] is net[6]
    assert groups[-1][-1] is net[0]
