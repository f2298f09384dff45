"""`fit_service` and `fides fit`, on a task that trains in seconds."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from fides_plugins.bundle import Bundle
from fides_plugins.cli import app
from fides_plugins.errors import BundleError, FidesError, TrainingError
from fides_plugins.onnx_model import OnnxModel
from fides_plugins.pipeline import Pipeline
from fides_plugins.settings import Settings
from fides_plugins.training.data import Dataset, split_rows
from fides_plugins.training.export import export_onnx
from fides_plugins.training.fit import FitOptions, fit_service
from fides_plugins.training.fit_report import FitReport
from fides_plugins.training.service.teachers import OnnxTeacher
from fides_plugins.training.stages import CHANGES_TRIED_ON, part_shares
from fides_plugins.types import Query

QUICK = FitOptions(agreement=0.9, epochs=6, transfer_rows=3000, false_alarm_rate=0.05)
CENTRES = np.random.default_rng(5).normal(0, 1.2, (4, 10)).astype(np.float32)


def rows(n: int, seed: int) -> Dataset:
    rng = np.random.default_rng(seed)
    labels = rng.integers(4, size=n)
    return Dataset((CENTRES[labels] + rng.normal(0, 0.8, (n, 10))).astype(np.float32), labels, tuple("abcd"))


@pytest.fixture(scope="module")
def service() -> bytes:
    """A wide network that computes each row's nearest centre, but for noise in its weights."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
    data = rows(2000, 1)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(60):
        loss = nn.functional.cross_entropy(net(torch.from_numpy(data.images)), torch.from_numpy(data.labels))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return export_onnx(net, data.images, "features", "classes")


@pytest.fixture(scope="module")
def fitted(service: bytes, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, FitReport]:
    out = tmp_path_factory.mktemp("fit") / "bundle"
    return out, fit_service(OnnxTeacher(service, "s.onnx"), rows(600, 2), out, seed=3, options=QUICK)


def test_bundle_serves_and_keeps_its_limits(fitted: tuple[Path, FitReport], service: bytes) -> None:
    out, report = fitted
    bundle = Bundle.load(out)
    assert bundle.digest == report.digest
    assert bundle.class_names == tuple("abcd")
    spec = bundle.manifest.verification
    assert spec is not None
    assert spec.input_name == "features"
    assert report.service_cost is not None
    assert report.verification_cost.parameters <= 0.1 * report.service_cost.parameters
    assert report.verification_cost.macs <= 0.125 * report.service_cost.macs
    test = rows(500, 9).images
    s = OnnxModel(service).run({"features": test})["classes"]
    v = bundle.model(spec).run({"features": test})[spec.output_name]
    agreed = (s.argmax(1) == v.argmax(1)).mean()
    assert agreed > 0.88
    assert abs(agreed - report.agreement) < 0.08
    assert bundle.model(spec).run({"features": test[:1]})[spec.output_name].shape == (1, 4)


def unsure_and_sure(n: int, seed: int) -> Dataset:
    """Rows for a linear service of 60 classes: the longer a row, the surer its answer."""
    rng = np.random.default_rng(seed)
    lengths = np.exp(rng.uniform(-2.5, 2.5, (n, 1)))
    return Dataset((lengths * rng.normal(size=(n, 12))).astype(np.float32))


def test_hosts_see_the_very_scores_that_calibration_saw(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 60), nn.Softmax(dim=1), nn.Unflatten(1, (60, 1, 1)))
    data = unsure_and_sure(480, 2)
    service = OnnxTeacher(export_onnx(net, data.images, "features", "classes"), "s.onnx")
    options = FitOptions(epochs=2, transfer_rows=480, false_alarm_rate=0.05, max_cost=9, max_size=9)
    fit_service(service, data, tmp_path / "b", seed=3, options=options, attacks=("switch",))
    bundle = Bundle.load(tmp_path / "b")
    assert bundle.manifest.service.output_kind == "probabilities"
    # The rows that calibrated, as fit chose them.
    rows = split_rows(data.images, part_shares(480), 3)["calibration"]
    output = OnnxModel(service.data).run({"features": data.images[rows]})["classes"]
    assert output.shape == (len(rows), 60, 1, 1)
    settings = Settings(bundle=str(tmp_path / "b"), false_alarm_rate=0.05, timeout_ms=60_000)
    pipeline = Pipeline.from_settings(settings)
    verdict = pipeline.run(Query({"features": data.images[rows]}), bundle.manifest.service.codec.read(output))
    calibrated = json.loads(bundle.file("calibration.json"))["learned"]
    np.testing.assert_array_equal(np.sort(verdict.score), np.array(calibrated, np.float32))


def test_parts_are_disjoint_and_counted(fitted: tuple[Path, FitReport]) -> None:
    out, report = fitted
    n = report.rows
    assert n["distillation"] + n["selection"] + n["calibration"] == 600
    tried = CHANGES_TRIED_ON * len(report.changes)
    assert report.asked == n["transfer"] + n["selection"] + n["calibration"] + tried
    provenance = Bundle.load(out).manifest.provenance
    assert provenance["rows"] == n
    assert provenance["seed"] == 3
    assert provenance["service"]["name"] == "s.onnx"
    assert len(provenance["data"]["sha256"]) == 64
    assert "torch" in provenance["versions"]
    assert str(out.parent) not in json.dumps(provenance)


def test_too_few_rows_say_how_many_are_needed(service: bytes, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="at least 396 rows"):
        fit_service(OnnxTeacher(service), rows(200, 2), tmp_path / "b", options=FitOptions())
    assert not (tmp_path / "b").exists()


def test_labels_out_of_range_are_found_before_training(service: bytes, tmp_path: Path) -> None:
    data = rows(600, 2)
    assert data.labels is not None
    with pytest.raises(TrainingError, match="labels lie outside 0 to 3"):
        fit_service(OnnxTeacher(service), Dataset(data.images, data.labels + 1), tmp_path / "b", options=QUICK)


def test_something_in_the_way_is_refused_first(service: bytes, tmp_path: Path) -> None:
    (tmp_path / "keep.txt").write_text("mine")
    with pytest.raises(BundleError, match="not a bundle"):
        fit_service(OnnxTeacher(service), rows(600, 2), tmp_path, options=QUICK)
    assert (tmp_path / "keep.txt").read_text() == "mine"


class Stopping(OnnxTeacher):
    """Stops answering after so many rows."""

    left = 1000

    def ask(self, images):  # type: ignore[no-untyped-def]
        if self.left < len(images):
            raise TrainingError("The endpoint stopped answering.")
        self.left -= len(images)
        return super().ask(images)


def test_stopped_endpoint_resumes_to_the_very_same_graphs(
    fitted: tuple[Path, FitReport], service: bytes, tmp_path: Path
) -> None:
    out = tmp_path / "again"
    with pytest.raises(TrainingError, match="stopped"):
        fit_service(Stopping(service, "s.onnx"), rows(600, 2), out, seed=3, options=QUICK)
    assert not out.exists()
    report = fit_service(OnnxTeacher(service, "s.onnx"), rows(600, 2), out, seed=3, options=QUICK)
    assert report.remembered > 800
    counted = sum(report.rows[p] for p in ("transfer", "selection", "calibration"))
    assert report.asked + report.remembered == counted + CHANGES_TRIED_ON * len(report.changes)
    assert Bundle.load(out).manifest.files == Bundle.load(fitted[0]).manifest.files
    assert [p.name for p in tmp_path.iterdir()] == ["again"]  # the cache of answers is gone


def test_command_line(service: bytes, tmp_path: Path) -> None:
    (tmp_path / "s.onnx").write_bytes(service)
    data = rows(600, 2)
    np.savez(tmp_path / "d.npz", images=data.images, labels=data.labels)
    arguments = ["fit", "--service", f"{tmp_path}/s.onnx", "--data", f"{tmp_path}/d.npz", "--out", f"{tmp_path}/b"]
    arguments += ["--agreement", "0.9", "--epochs", "6", "--transfer-rows", "3000", "--false-alarm-rate", "0.05"]
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["service_accuracy"] > 0.8
    assert report["steps"][0]["kept"]
    assert Bundle.load(tmp_path / "b").digest == report["digest"]


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--service", "x.onnx"],
        ["--predictions", "p.npz", "--service", "x.onnx"],
        ["--service", "x.onnx", "--data", "d.npz", "--output-kind", "scores"],
        ["--service", "x.onnx", "--data", "d.npz", "--student-size", "32x32"],
        ["--service", "x.onnx", "--data", "d.npz", "--student", "a:b", "--student-size", "large"],
    ],
)
def test_wrong_use(arguments: list[str], tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["fit", "--out", str(tmp_path / "b"), *arguments])
    assert isinstance(result.exception, FidesError)
