"""The stages of a fit: each is a frozen result, made by one function from the results before it.

split -> answers -> verification model -> detection. The rows are cut into three disjoint parts: for distillation, for
choosing among students, and for detection, of which `train_on` again keeps a part that only calibrates. No part sees
another's rows, so what is reported as agreement and as false-alarm budget holds for rows that nothing was trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fides_plugins.bundle import InputSpec, VerificationSpec
from fides_plugins.codec import OutputCodec
from fides_plugins.onnx_model import OnnxModel
from fides_plugins.training.attacks import AttackRegistry, default_registry
from fides_plugins.training.costs import Cost, onnx_cost
from fides_plugins.training.data import Dataset, load_data, match_input, split_rows
from fides_plugins.training.detector.calibration import require_rows
from fides_plugins.training.detector.detection import DETECTOR_FILE, DetectionArtifacts, train_on
from fides_plugins.training.distil.distillation import Augmentation, DistillationSettings, TransferSet, augment
from fides_plugins.training.distil.gdtl import GdtlResult, Search
from fides_plugins.training.distil.students import Student, VerificationModel, built_in_students
from fides_plugins.training.distil.workers import Worker
from fides_plugins.training.evaluation.forms import FormCost, form_costs
from fides_plugins.training.export import export_onnx
from fides_plugins.training.predictions import Predictions, run_graph
from fides_plugins.training.service.teacher import Teacher
from fides_plugins.training.service.teachers import AnswerCache, output_kind
from fides_plugins.types import Float32Array, IntArray, OutputKind

VERIFICATION_FILE = "verification.onnx"
OUTPUT_NAME = "logits"

#: Share of the rows for each part.
SHARES = {"distillation": 0.45, "selection": 0.10, "detection": 0.45}
#: Share of the detection rows that only calibrate.
CALIBRATION_FRACTION = 0.5
#: The transfer set never takes more memory than this.
MAX_TRANSFER_BYTES = 1 << 30
MAX_COPIES = 40

#: Called as work goes on: name of the stage, units done, units in all.
Progress = Callable[[str, int, int], None]
#: (rows of the service's tensor, K) -> candidates.
MakeStudents = Callable[[NDArray[Any], int], Sequence[Student]]


@dataclass(frozen=True)
class FitOptions:
    """What can be chosen; the defaults suit small images.

    Attributes
    ----------
    agreement, tolerance:
        Wanted held-out agreement of verification model and service, and what an unfreezing step must add.
    max_cost, max_size:
        The verification model's largest share of the service's multiply-adds and of its parameters.
    max_macs, max_parameters:
        The same as numbers, for services whose cost cannot be counted (endpoints). Both limits hold.
    false_alarm_rate:
        The smallest budget that the calibration must support.
    transfer_rows:
        About how many rows the teacher is asked: the distillation rows and changed copies of them.
    epochs, temperature, alpha, beta, fine_tune_rate:
        Of distillation, see `DistillationSettings`.
    scale:
        Factor for pixel values, see `data.match_input`.
    flip:
        Mirrored copies are fine for these images.
    output_kind:
        What the service answers; empty: told by its answers.
    """

    agreement: float = 0.99
    tolerance: float = 0.002
    max_cost: float = 0.125
    max_size: float = 0.1
    max_macs: int | None = None
    max_parameters: int | None = None
    false_alarm_rate: float = 0.01
    transfer_rows: int = 16_000
    epochs: int = 20
    temperature: float = 5.0
    alpha: float = 0.8
    beta: float = 0.2
    fine_tune_rate: float = 4e-3
    scale: float | None = None
    flip: bool = False
    output_kind: OutputKind | None = None

    def distillation(self) -> DistillationSettings:
        """The part that distillation needs."""
        return DistillationSettings(
            self.temperature, self.alpha, self.beta, self.epochs, fine_tune_learning_rate=self.fine_tune_rate
        )


@dataclass(frozen=True, eq=False)
class Fit:
    """What every stage of one fit works with: who is asked, what was chosen, and who is told of the progress."""

    teacher: AnswerCache
    options: FitOptions
    seed: int
    tell: Progress


@dataclass(frozen=True, eq=False)
class SplitData:
    """The data as the service takes them, and which rows belong to which part.

    Attributes
    ----------
    data:
        N rows in the service's dtype and shape.
    input:
        The tensor that they are.
    scale:
        Factor that was applied to the pixel values.
    parts:
        Name of each of `SHARES` to its row indices.
    """

    data: Dataset
    input: InputSpec
    scale: float
    parts: Mapping[str, IntArray]

    def images(self, part: str) -> NDArray[Any]:
        """(n, ...) rows of a part."""
        return self.data.images[self.parts[part]]

    def labels(self, part: str) -> IntArray | None:
        """(n,) labels of a part, where there are any."""
        return None if self.data.labels is None else self.data.labels[self.parts[part]]


@dataclass(frozen=True, eq=False)
class AnsweredData:
    """What the service answered, and what it costs.

    Attributes
    ----------
    codec:
        Reads its outputs, here and in every host.
    outputs:
        (n, K) as it gave them, of "selection" and "detection".
    transfer:
        The distillation rows and changed copies of them, answered.
    cost:
        Of the service for one row; None where it cannot be counted.
    """

    codec: OutputCodec
    outputs: Mapping[str, Float32Array]
    transfer: TransferSet
    cost: Cost | None

    @property
    def n_classes(self) -> int:
        """K, the number of classes."""
        return int(self.transfer.logits.shape[1])


@dataclass(frozen=True, eq=False)
class FittedDetection:
    """The verification model as it will serve, and detection trained on its answers.

    Attributes
    ----------
    graph, spec, cost:
        The verification model's ONNX bytes, how it is called and read, and what it costs.
    rows:
        What both models answered to the detection rows.
    artifacts:
        Detector, re-classifier and calibration.
    told_form, forms:
        The coarse form that the service answers in (empty: none), and what coarse forms would cost.
    """

    graph: bytes
    spec: VerificationSpec
    cost: Cost
    rows: Predictions
    artifacts: DetectionArtifacts
    told_form: str
    forms: tuple[FormCost, ...]


def split_data(fit: Fit, source: str | Path | Dataset) -> SplitData:
    """Read the data, bring them to the service's tensor, and split them.

    Raises
    ------
    TrainingError
        If the data do not fit the service, or are too few for the false-alarm budget.
    """
    data = source if isinstance(source, Dataset) else load_data(source, fit.teacher.input)
    spec = _spec(fit.teacher, data)
    data, scale = match_input(data, spec, fit.options.scale)
    given = InputSpec(name=spec.name, dtype=data.images.dtype.name, shape=(None, *data.images.shape[1:]))
    parts = split_rows(data.images, SHARES, fit.seed)
    calibration = int(CALIBRATION_FRACTION * len(parts["detection"]))
    require_rows(calibration, CALIBRATION_FRACTION * SHARES["detection"], fit.options.false_alarm_rate)
    return SplitData(data, given, scale, parts)


def _spec(teacher: Teacher, data: Dataset) -> InputSpec:
    if teacher.input is not None:
        return teacher.input
    dtype = "float32" if data.images.dtype == np.float64 else data.images.dtype.name
    return InputSpec(name=teacher.input_name, dtype=dtype, shape=(None, *data.images.shape[1:]))


def collect_answers(fit: Fit, split: SplitData) -> AnsweredData:
    """The service's answers to every part, and to changed copies of the distillation rows.

    Raises
    ------
    TrainingError
        If the service stops answering, or a label is none of its classes.
    """
    options, images = fit.options, split.images("distillation")
    copies = _copies(images, options.transfer_rows)
    shown, labels = augment(images, split.labels("distillation"), copies, fit.seed, Augmentation(flip=options.flip))
    held = {part: split.images(part) for part in ("selection", "detection")}
    total = len(shown) + sum(map(len, held.values()))
    done = 0

    def ask(rows: NDArray[Any]) -> Float32Array:
        nonlocal done
        raw = fit.teacher.ask(rows, lambda n: fit.tell("ask the service", done + n, total))
        done += len(rows)
        return raw

    # The real rows first: an unusable service or label is found before thousands of copies are answered.
    outputs = {part: ask(rows) for part, rows in held.items()}
    split.data.check_labels(outputs["detection"].shape[1])
    raw = ask(shown)
    codec = OutputCodec(options.output_kind or output_kind(np.concatenate([raw, *outputs.values()])))
    return AnsweredData(codec, outputs, TransferSet(shown, codec.logits(raw), labels), fit.teacher.cost(shown))


def _copies(images: NDArray[Any], transfer_rows: int) -> int:
    """Changed copies of each row: as many as are wanted and fit into memory."""
    wanted = transfer_rows // len(images) - 1
    affordable = MAX_TRANSFER_BYTES // max(1, images[0].size * 4 * len(images)) - 1
    return int(np.clip(min(wanted, affordable), 0, MAX_COPIES))


def distil_model(
    fit: Fit, split: SplitData, answers: AnsweredData, students: MakeStudents | None, who: Worker
) -> GdtlResult:
    """The greedy search for a verification model.

    Raises
    ------
    TrainingError
        If no student is within the limits of cost.
    """
    options, cost, rows = fit.options, answers.cost, answers.transfer.images
    macs, parameters = options.max_macs, options.max_parameters
    if cost is not None:
        macs = _least(macs, options.max_cost * cost.macs)
        parameters = _least(parameters, options.max_size * cost.parameters)
    if students is None:
        candidates: Sequence[Student] = built_in_students(rows, answers.n_classes, parameters, macs)
    else:
        candidates = students(rows, answers.n_classes)
    search = Search(
        answers.transfer,
        split.images("selection"),
        answers.codec.logits(answers.outputs["selection"]),
        options.agreement,
        options.tolerance,
        options.distillation(),
        fit.seed,
        who,
    )
    return search.run(candidates, parameters, macs, lambda share: fit.tell("distil", round(100 * share), 100))


def _least(limit: int | None, other: float) -> int:
    return int(other) if limit is None else min(limit, int(other))


def fit_detection(
    fit: Fit,
    split: SplitData,
    answers: AnsweredData,
    model: VerificationModel,
    attacks: Sequence[str],
    registry: AttackRegistry | None,
) -> FittedDetection:
    """Export the verification model, and train and calibrate detection on the graph's own answers.

    Raises
    ------
    TrainingError
        If the graph differs from the model, or the rows cannot be used.
    SettingsError
        If an attack is unknown.
    """
    images = split.images("detection")
    spec = VerificationSpec(file=VERIFICATION_FILE, input_name=split.input.name, output_name=OUTPUT_NAME)
    graph = export_onnx(model, images, spec.input_name, spec.output_name)
    output = run_graph(OnnxModel(graph, name=spec.file), spec.output_name, **{spec.input_name: images})
    rows = Predictions.check(
        answers.outputs["detection"],
        output,
        split.labels("detection"),
        service_codec=answers.codec,
        verification_codec=spec.codec,
    )
    artifacts = train_on(
        rows,
        attacks=attacks,
        registry=registry,
        false_alarm_rate=fit.options.false_alarm_rate,
        calibration_fraction=CALIBRATION_FRACTION,
        seed=fit.seed,
        progress=lambda share: fit.tell("train detection", round(100 * share), 100),
    )
    _, held_out = rows.split(CALIBRATION_FRACTION, fit.seed)
    # The built-in ones: a registry of the caller's own need not have them.
    lies = [default_registry().output(name) for name in ("switch", "random")]
    detector = OnnxModel(artifacts.detector_onnx, name=DETECTOR_FILE)
    forms = form_costs(detector, held_out, lies, fit.options.false_alarm_rate, fit.seed)
    told = answers.codec.coarse_form(answers.outputs["detection"])
    return FittedDetection(graph, spec, onnx_cost(graph, images.shape[1:]), rows, artifacts, told, forms)
