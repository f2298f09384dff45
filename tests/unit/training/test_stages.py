"""Which rows decide what in a fit, what is asked, and what students of other kinds than images learn from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fides_plugins.errors import TrainingError
from fides_plugins.training.data import Dataset, split_rows
from fides_plugins.training.distil.augmentation import augment
from fides_plugins.training.distil.distillation import TransferSet, distillation_temperature
from fides_plugins.training.distil.pretrained import PretrainedNetwork, pretrained_student
from fides_plugins.training.distil.students import built_in_students
from fides_plugins.training.export import export_onnx
from fides_plugins.training.kinds import Kind
from fides_plugins.training.options import FitOptions
from fides_plugins.training.service.teachers import AnswerCache, OnnxTeacher
from fides_plugins.training.stages import Fit, collect_answers, part_shares, split_data
from tests.unit.training.test_kinds import files, speech, words

RNG = np.random.default_rng(0)


class FirstByte(nn.Module):
    """A service that answers by what a sequence begins with: any other beginning is another class."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return nn.functional.one_hot(ids[:, 0].long() % 7, 7).float() * 8.0


def fit_of(service: nn.Module, rows: np.ndarray, tmp_path: Path, **options: object) -> tuple[Fit, Dataset]:
    teacher = OnnxTeacher(export_onnx(service, rows, "tokens", "classes"), "s.onnx")
    chosen = FitOptions(transfer_rows=3 * len(rows), false_alarm_rate=0.1, **options)  # type: ignore[arg-type]
    return Fit(AnswerCache(teacher, tmp_path), chosen, 0, lambda stage, done, total: None), Dataset(rows)


def test_the_parts_of_few_and_of_many_rows():
    assert part_shares(1000) == {"distillation": 0.65, "calibration": 0.25, "selection": 0.1}
    many = part_shares(100_000)
    assert many["calibration"] * 100_000 == 4000
    assert many["selection"] * 100_000 == 1000
    assert sum(many.values()) == pytest.approx(1.0)


def test_rows_of_one_group_stay_together():
    rows = RNG.random((300, 4))
    groups = RNG.integers(0, 60, 300)
    rows[7] = rows[250]  # two groups that are linked by equal rows
    parts = split_rows(rows, {"a": 0.5, "b": 0.5}, 1, groups)
    inside = np.isin(np.arange(300), parts["a"])
    for group in range(60):
        assert len(set(inside[groups == group].tolist())) <= 1
    assert len(set(inside[np.isin(groups, groups[[7, 250]])].tolist())) == 1


def test_changes_under_which_the_service_gives_another_class_are_left_out(tmp_path: Path):
    # The beginning decides: a shift makes another class of most rows, a stretch of padding of few.
    fit, data = fit_of(FirstByte(), files(256), tmp_path)
    answers = collect_answers(fit, split_data(fit, data))
    assert set(answers.changes) == {"drop", "shift", "crop", "splice"}
    assert answers.changes["shift"] < 0.5 < answers.changes["crop"]
    own = answers.outputs["distillation"].argmax(axis=1)
    kept = answers.transfer.logits.argmax(axis=1) == own[answers.transfer.origins[:, 0]]  # type: ignore[index]
    assert kept.mean() > 0.8


class Checksum(nn.Module):
    """A service to which every change is another class."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        place = torch.arange(1, ids.shape[1] + 1)
        return nn.functional.one_hot((ids.long() * place).sum(1) % 50, 50).float() * 8.0


def test_without_a_change_that_is_of_use_there_are_no_copies(tmp_path: Path):
    fit, data = fit_of(Checksum(), files(128), tmp_path)
    answers = collect_answers(fit, split_data(fit, data))
    assert max(answers.changes.values()) < 0.5
    assert answers.transfer.n_rows == len(answers.outputs["distillation"])
    assert len(answers.outputs["distillation"]) < fit.teacher.asked


def test_no_copy_of_a_row_reaches_the_model_that_answers_it():
    rows = files(128)
    shown, labels, origins = augment(rows, np.arange(len(rows)), 4, 0, kind="bytes")
    logits = np.zeros((len(shown), 3), np.float32)
    fold = np.arange(0, len(rows), 2)
    left = TransferSet(shown, logits, labels, origins).without(fold)
    assert 0 < left.n_rows < len(shown) / 2  # of the blends, those with a row of the fold go, too
    assert left.origins is not None
    assert not np.isin(left.origins, fold).any()
    assert not set(left.labels.tolist()) & set(fold.tolist())


@pytest.mark.parametrize(("classes", "temperature"), [(2, 5.0), (10, 5.0), (214, 2.0), (1000, 1.5)])
def test_many_classes_are_distilled_at_a_lower_temperature(classes: int, temperature: float):
    # As a service answers that is sure in a half of the rows.
    logits = RNG.normal(0, 1, (400, classes)).astype(np.float32)
    logits[np.arange(400), RNG.integers(0, classes, 400)] += np.where(RNG.random(400) < 0.5, 12, 7)
    assert distillation_temperature(logits) == pytest.approx(temperature, rel=0.5)
    assert distillation_temperature(logits) <= 5.0


@pytest.mark.parametrize(("kind", "rows"), [("bytes", files(600)), ("tokens", words()), ("audio", speech())])
def test_students_of_each_kind_are_the_same_in_a_graph(kind: Kind, rows: np.ndarray):
    for student in built_in_students(rows, 5, kind=kind):
        model = student.model(rows, 0)
        graph = export_onnx(model, rows, "rows", "classes")  # checks itself against the module
        assert len(graph) > 100


def test_a_table_with_missing_values_and_heavy_tails_has_students(tmp_path: Path):
    rows = np.column_stack([RNG.lognormal(0, 4, 300), RNG.integers(0, 3, 300), RNG.normal(size=300)]).astype(np.float32)
    students = built_in_students(rows, 4, max_parameters=5000, kind="vector")
    assert {s.name.rsplit("-", 1)[0] for s in students} == {"mlp", "mlp-quantiles"}
    encoded = next(s for s in students if "quantiles" in s.name).model(rows, 0)
    rows[3, 2] = np.nan
    with torch.no_grad():
        assert torch.isfinite(encoded(torch.from_numpy(rows))).all()


def test_a_network_from_scratch_is_trained_as_a_whole_and_gives_the_classes(tmp_path: Path):
    rows = words()
    made = pretrained_student("tests.unit.training.test_stages:bag_of_words", rows, 5, from_scratch=True)
    network = made.model(rows, 0).network
    assert not isinstance(network, PretrainedNetwork)
    assert all(p.requires_grad for p in network.parameters())
    with pytest.raises(TrainingError, match="gives 5 classes, the service 6"):
        pretrained_student("tests.unit.training.test_stages:bag_of_words", rows, 6, from_scratch=True)


def bag_of_words() -> nn.Module:
    return nn.Sequential(nn.EmbeddingBag(20_000, 8), nn.Linear(8, 5))
