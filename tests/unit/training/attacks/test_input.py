"""Attacks on the input, by the Adversarial Robustness Toolbox."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from fides_plugins.bundle import Bundle, Manifest, ServiceSpec, VerificationSpec
from fides_plugins.errors import TrainingError
from fides_plugins.training.attacks.input import InputAttack, input_attacks
from fides_plugins.training.attacks.model import Victim
from fides_plugins.training.export import export_onnx
from fides_plugins.training.service.teachers import OnnxTeacher, TorchTeacher
from fides_plugins.types import OutputKind

pytest.importorskip("art", reason="the extra `attacks` is not installed")


def linear() -> nn.Module:
    """Three classes by which of three pixels is brightest."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(9, 3, bias=False))
    with torch.no_grad():
        net[1].weight.copy_(4 * torch.eye(3, 9))  # type: ignore[union-attr, operator]
    return net.eval()


X = np.random.default_rng(0).random((60, 1, 3, 3)).astype(np.float32)


def bundle(kind: OutputKind = "logits") -> Bundle:
    manifest = Manifest(
        class_names=tuple("abc"),
        service=ServiceSpec(output_kind=kind),
        verification=VerificationSpec(file="v.onnx", input_name="input"),
    )
    return Bundle.in_memory(manifest, {"v.onnx": export_onnx(linear(), X)})


@pytest.fixture(scope="module")
def victim() -> Victim:
    return Victim(TorchTeacher(linear(), "service"), bundle(), X)


@pytest.mark.parametrize("name", ["fgsm", "pgd", "carlini_wagner"])
def test_rows_change_class_by_a_small_change(victim: Victim, name: str) -> None:
    attack = input_attacks()[name]
    assert isinstance(attack, InputAttack)
    perturbed = attack.perturb(victim, 0)
    span = victim.images.max() - victim.images.min()
    change = np.abs(perturbed - victim.images)
    assert perturbed.dtype == np.float32
    assert perturbed.min() >= victim.images.min()
    assert perturbed.max() <= victim.images.max()
    if name != "carlini_wagner":
        assert change.max() <= attack.distances["eps"] * span + 1e-6
    found = attack.run(victim, 0)
    honest = victim.service(victim.images).label
    assert len(found.rows) >= 15
    assert (found.service.argmax(1) != honest[found.rows]).all()
    # Both models saw the perturbed input, and here they are one and the same.
    assert np.allclose(found.service, found.verification, atol=1e-5)
    assert np.array_equal(perturbed, attack.perturb(victim, 0))


def test_probability_services_are_attacked_too(victim: Victim) -> None:
    module = nn.Sequential(linear(), nn.Softmax(dim=1)).eval()
    other = replace(victim, teacher=TorchTeacher(module, "service"), bundle=bundle("probabilities"))
    assert len(input_attacks()["fgsm"].run(other, 0).rows) >= 15


def test_global_generators_are_left_alone(victim: Victim) -> None:
    np.random.seed(1)
    torch.manual_seed(1)
    wanted = np.random.random(), torch.rand(1).item()
    np.random.seed(1)
    torch.manual_seed(1)
    input_attacks()["pgd"].run(victim, 5)
    assert (np.random.random(), torch.rand(1).item()) == wanted


def test_only_torch_services_and_floats(victim: Victim) -> None:
    onnx = replace(victim, teacher=OnnxTeacher(export_onnx(linear(), victim.images)))
    with pytest.raises(TrainingError, match="no torch module"):
        input_attacks()["fgsm"].run(onnx, 0)
    with pytest.raises(TrainingError, match="float32"):
        input_attacks()["fgsm"].run(replace(victim, images=victim.images.astype(np.float64)), 0)
