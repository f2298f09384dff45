"""Attacks on the service model."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from fides_plugins.bundle import Bundle, Manifest, ServiceSpec, VerificationSpec
from fides_plugins.errors import PluginError, TrainingError
from fides_plugins.training.attacks import default_registry
from fides_plugins.training.attacks.input import add_service_attacks
from fides_plugins.training.attacks.model import BadNets, BitFlips, LabelPermutation, Substitute, Victim, flip_bits
from fides_plugins.training.export import export_onnx
from fides_plugins.training.service.teachers import OnnxTeacher, TorchTeacher
from fides_plugins.types import OutputKind

PROTOTYPES = (np.random.default_rng(3).random((4, 8, 8)) > 0.5).astype(np.float32)


def images(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Noisy copies of four patterns (n, 1, 8, 8), and which."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(4, size=n)
    x = 0.8 * PROTOTYPES[labels] + 0.1 * rng.normal(size=(n, 8, 8))
    return np.clip(x, 0, 1)[:, None].astype(np.float32), labels


def trained(width: int, seed: int) -> nn.Module:
    """A classifier of the patterns."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 4))
    x, y = images(300, 1)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(40):
        loss = nn.functional.cross_entropy(net(torch.from_numpy(x)), torch.from_numpy(y))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return net.eval()


def bundle(kind: OutputKind = "logits") -> Bundle:
    """A bundle that holds nothing but a verification model."""
    x, _ = images(4, 0)
    manifest = Manifest(
        class_names=tuple("abcd"),
        service=ServiceSpec(output_kind=kind),
        verification=VerificationSpec(file="v.onnx", input_name="input"),
    )
    return Bundle.in_memory(manifest, {"v.onnx": export_onnx(trained(8, 5), x)}, "test")


@pytest.fixture(scope="module")
def victim() -> Victim:
    x, _ = images(200, 2)
    more, labels = images(300, 4)
    return Victim(TorchTeacher(trained(32, 0), "service"), bundle(), x, more, labels)


def test_bits_are_flipped_and_flipped_back() -> None:
    a = [np.ones((3, 4), np.float32), np.zeros(5, np.float32)]
    flip_bits(a, 7, np.random.default_rng(0))
    flipped = sum(
        int(np.unpackbits((b.view(np.uint32) ^ c.view(np.uint32)).view(np.uint8)).sum())
        for b, c in zip(a, [np.ones((3, 4), np.float32), np.zeros(5, np.float32)], strict=True)
    )
    assert 0 < flipped <= 7
    flip_bits(a, 7, np.random.default_rng(0))
    assert np.array_equal(a[0], np.ones((3, 4)))
    assert np.array_equal(a[1], np.zeros(5))


@pytest.mark.parametrize("form", ["torch", "onnx"])
def test_bit_flips_change_answers_but_not_the_service(victim: Victim, form: str) -> None:
    module = victim.module("test")
    teacher = victim.teacher if form == "torch" else OnnxTeacher(export_onnx(module, victim.images))
    attacked = Victim(teacher, victim.bundle, victim.images)
    before = attacked.service(victim.images).probabilities
    found = BitFlips(flips=60).run(attacked, 1)
    assert np.array_equal(attacked.service(victim.images).probabilities, before)
    assert 0 < len(found.rows) <= 200
    assert (found.service.argmax(1) != before.argmax(1)[found.rows]).all()
    assert np.allclose(found.verification, victim.verification(victim.images).probabilities[found.rows])
    again = BitFlips(flips=60).run(attacked, 1)
    assert np.array_equal(found.rows, again.rows)


def test_permutation_moves_every_class(victim: Victim) -> None:
    found = LabelPermutation().run(victim, 0)
    assert len(found.rows) == len(victim.images)
    honest = victim.service(victim.images).probabilities
    assert np.allclose(np.sort(found.service, 1), np.sort(honest, 1))
    pairs = set(zip(honest.argmax(1).tolist(), found.service.argmax(1).tolist(), strict=True))
    assert len(pairs) == 4


def test_substitute_is_another_weaker_model(victim: Victim) -> None:
    weak = Substitute(epochs=1, build=lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 1), nn.Linear(1, 4)))
    found = weak.run(victim, 0)
    assert 0 < len(found.rows) < 200
    # A substitute of a service that answers probabilities answers them as well.
    module = nn.Sequential(victim.module("test"), nn.Softmax(dim=1)).eval()
    other = replace(victim, teacher=TorchTeacher(module, "service"), bundle=bundle("probabilities"))
    np.testing.assert_array_equal(weak.run(other, 0).rows, found.rows)


def test_backdoor_answers_the_target_under_the_trigger_only(victim: Victim) -> None:
    attack = BadNets(target=2, epochs=25, learning_rate=5e-3)
    assert not np.array_equal(attack.trigger(victim.images), victim.images)
    honest = victim.service(victim.images).label
    poisoned = TorchTeacher(attack.poison(victim, 0), "poisoned")
    clean = victim.service(victim.images, poisoned).label
    assert (clean == honest).mean() > 0.9
    found = attack.run(victim, 0)
    assert (found.service.argmax(1) == 2).mean() > 0.9
    assert len(found.rows) > 0.5 * (honest != 2).sum()
    # The verification model sees the patch as well, and was never taught what it means.
    assert (found.verification.argmax(1) == honest[found.rows]).mean() > 0.8


@pytest.mark.parametrize("shape", [(3, 9, 8), (9, 8, 3), (9, 8)])
def test_trigger_is_one_pixel_off_the_last_corner(shape: tuple[int, ...]) -> None:
    x = np.zeros((2, *shape), np.float32)
    x[0].flat[0] = 5.0
    out = BadNets().trigger(x)
    picture = out[1] if len(shape) == 2 else out[1].max(axis=0 if shape[0] == 3 else 2)
    assert np.argwhere(picture == 5.0).tolist() == [[6, 5], [6, 6], [7, 5], [7, 6]]


def test_what_an_attack_needs_is_said(victim: Victim) -> None:
    onnx = Victim(OnnxTeacher(export_onnx(victim.module("t"), victim.images)), victim.bundle, victim.images)
    with pytest.raises(TrainingError, match="rows to train on"):
        Substitute().run(onnx, 0)
    with pytest.raises(TrainingError, match="needs images"):
        BadNets().trigger(np.zeros((2, 5), np.float32))
    with pytest.raises(TrainingError, match="no torch module"):
        onnx.module("backdoor")


def test_all_are_registered_by_name_beside_output_attacks() -> None:
    registry = add_service_attacks(default_registry())
    assert set(registry.names("model")) == {"bit_flips", "substitute", "backdoor", "label_permutation"}
    assert set(registry.names("input")) == {"fgsm", "pgd", "carlini_wagner"}
    assert "switch" in registry.names("output")
    with pytest.raises(PluginError, match="two attacks"):
        add_service_attacks(registry)
