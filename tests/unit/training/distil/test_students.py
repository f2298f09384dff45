"""Students, their pre-processing, cost and export."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fides_plugins.errors import TrainingError
from fides_plugins.onnx_model import OnnxModel
from fides_plugins.training.costs import Cost, onnx_cost, torch_cost
from fides_plugins.training.distil.networks import small_cnn
from fides_plugins.training.distil.pretrained import PretrainedNetwork, pretrained_student, without_last_linear
from fides_plugins.training.distil.students import Preprocess, Student, built_in_students
from fides_plugins.training.export import export_onnx
from fides_plugins.training.service.torch_modules import load_weights

RNG = np.random.default_rng(0)


def test_costs_by_hand() -> None:
    net = nn.Sequential(nn.Conv2d(2, 5, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 36, 7))
    # Convolution: 6 * 6 * 5 outputs, each over 2 * 9 inputs; linear: 180 * 7.
    macs = 36 * 5 * 18 + 180 * 7
    parameters = 5 * 18 + 5 + 180 * 7 + 7
    x = RNG.random((3, 2, 6, 6), dtype=np.float32)
    assert torch_cost(net, x) == Cost(parameters, macs)
    assert onnx_cost(export_onnx(net, x), (2, 6, 6)).macs == macs


def test_cost_of_something_else_is_refused() -> None:
    with pytest.raises(TrainingError, match="cannot be counted"):
        onnx_cost(b"nonsense", (2,))


@pytest.mark.parametrize("shape", [(1, 8, 8), (28, 28, 1), (3, 40, 30), (8, 8), (20,)])
def test_built_in_students_stay_in_budget_and_export(shape: tuple[int, ...]) -> None:
    x = RNG.random((6, *shape), dtype=np.float32)
    students = built_in_students(x, 4, max_parameters=4000, max_macs=400_000)
    costs = [s.cost(x) for s in students]
    assert all(c.parameters <= 4000 and c.macs <= 400_000 for c in costs)
    assert [c.macs for c in costs] == sorted(c.macs for c in costs)
    model = students[-1].model(x, 0)
    graph = OnnxModel(export_onnx(model, x, "image"))
    with torch.no_grad():
        wanted = model(torch.from_numpy(x)).numpy()
    for n in (1, 6):
        assert np.allclose(graph.run({"image": x[:n]})["logits"], wanted[:n], atol=1e-4)


def test_integer_images_are_cast_in_the_graph() -> None:
    x = RNG.integers(0, 256, (4, 16, 16, 3)).astype(np.uint8)
    model = built_in_students(x, 3, 3000)[0].model(x, 0)
    graph = OnnxModel(export_onnx(model, x))
    assert graph.inputs[0].dtype == np.uint8
    assert graph.run({"input": x[:1]})["logits"].shape == (1, 3)


def test_export_holds_no_paths_and_is_repeatable() -> None:
    x = RNG.random((3, 1, 8, 8), dtype=np.float32)
    student = built_in_students(x, 3, 3000)[0]
    first, again = (export_onnx(student.model(x, 5), x) for _ in range(2))
    assert first == again
    assert b"site-packages" not in first
    assert str(Path.cwd()).encode() not in first


def test_batch_dependent_module_is_refused() -> None:
    class Centred(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x - x.mean(0, keepdim=True) * x.shape[0]

    with pytest.raises(TrainingError, match="differs from the torch module"):
        _checked_with_other_weights(Centred())


def _checked_with_other_weights(module: nn.Module) -> None:
    from fides_plugins.training import export

    x = RNG.random((3, 4), dtype=np.float32)
    data = export_onnx(nn.Identity(), x)
    export._check(data, module, torch.from_numpy(x), "input")


def test_nothing_fits_says_what_the_smallest_costs() -> None:
    with pytest.raises(TrainingError, match=r"smallest built-in student has \d+ parameters"):
        built_in_students(np.zeros((2, 1, 8, 8), np.float32), 10, max_parameters=10)


def test_preprocess_averages_whole_blocks_and_normalises() -> None:
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    net = Preprocess((1, 4, 4), np.array([2.0], np.float32), np.array([4.0], np.float32), size=(2, 2), channels=3)
    y = net(x)
    assert y.shape == (1, 3, 2, 2)
    assert torch.allclose(y[0, 0], (torch.tensor([[2.5, 4.5], [10.5, 12.5]]) - 2) / 4)


def test_features_that_never_move_do_not_explode() -> None:
    x = RNG.random((20, 5), dtype=np.float32)
    x[:, 2] = 7.0
    model = Student("one", lambda: nn.Linear(5, 3)).model(x, 0)
    other = x.copy()
    other[:, 2] = 7.5
    with torch.no_grad():
        assert model.preprocess(torch.from_numpy(other)).abs().max() < 10


def test_same_seed_same_weights_and_global_generator_untouched() -> None:
    x = RNG.random((3, 1, 8, 8), dtype=np.float32)
    student = Student("cnn", lambda: small_cnn(1, (8, 8), 4, 3))
    state = torch.random.get_rng_state()
    first, again, other = student.model(x, 1), student.model(x, 1), student.model(x, 2)
    assert torch.equal(torch.random.get_rng_state(), state)
    a, b, c = (next(m.network.parameters()) for m in (first, again, other))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def make_backbone() -> nn.Module:
    """A network as somebody may have pre-trained it."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 11)
    )


def test_pretrained_factory_with_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import save_file

    weights = make_backbone()
    with torch.no_grad():
        weights[0].weight.fill_(0.25)  # type: ignore[operator, union-attr]
    save_file(weights.state_dict(), str(tmp_path / "w.safetensors"))
    (tmp_path / "somebodys_net.py").write_text(
        "from torch import nn\n"
        "def make():\n"
        "    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1),\n"
        "                         nn.Flatten(), nn.Linear(6, 11))\n"
    )
    monkeypatch.chdir(tmp_path)
    x = RNG.random((4, 1, 8, 8), dtype=np.float32)
    student = pretrained_student(
        "somebodys_net:make", x, 5, weights=tmp_path / "w.safetensors", channels=3, mean=(0.5,) * 3, std=(0.2,) * 3
    )
    sys.modules.pop("somebodys_net", None)
    network = student.model(x, 0).network
    assert isinstance(network, PretrainedNetwork)
    assert torch.all(network.backbone[0].weight == 0.25)  # type: ignore[index, union-attr]
    assert student.model(x, 0).eval()(torch.from_numpy(x)).shape == (4, 5)


def test_pretrained_torchscript(tmp_path: Path) -> None:
    path = tmp_path / "net.pt"
    torch.jit.script(make_backbone().eval()).save(str(path))  # type: ignore[no-untyped-call]
    x = RNG.random((4, 3, 8, 8), dtype=np.float32)
    model = pretrained_student(str(path), x, 5).model(x, 0)
    graph = OnnxModel(export_onnx(model, x))
    assert graph.run({"input": x})["logits"].shape == (4, 5)
    assert graph.run({"input": x[:1]})["logits"].shape == (1, 5)


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"pickled.*refused"):
        load_weights(make_backbone(), tmp_path / "w.pth")


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"other": torch.zeros(2)}, str(tmp_path / "w.safetensors"))
    with pytest.raises(TrainingError, match="does not fit"):
        load_weights(make_backbone(), tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    "spec", ["no_such_module_here:f", "fides_plugins.errors:nothing", "fides_plugins.errors:FidesError"]
)
def test_bad_factories(spec: str) -> None:
    with pytest.raises(TrainingError):
        pretrained_student(spec, np.zeros((2, 4), np.float32), 3)


def test_wrong_input_says_what_to_state(tmp_path: Path) -> None:
    path = tmp_path / "net.pt"
    torch.jit.script(make_backbone()).save(str(path))  # type: ignore[no-untyped-call]
    with pytest.raises(TrainingError, match="size and the channels"):
        pretrained_student(str(path), np.zeros((2, 1, 8, 8), np.float32), 3)


def test_last_linear_is_cut_off() -> None:
    net = without_last_linear(make_backbone())
    assert net(torch.zeros(2, 3, 8, 8)).shape == (2, 6)
