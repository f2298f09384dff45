"""The stages of a fit: each is a frozen result, made by one function from the results before it.

split -> answers -> verification model -> detection. The rows are cut into three disjoint parts: for distillation, for
choosing among students, and for calibration. What is reported as agreement and as false-alarm budget is of the last
one, whose rows nothing was trained on or chosen by. The detector needs pairs of answers that look as they will in
service, so from rows that the verification model did not learn from; the rows of distillation give them by
cross-fitting: models like the chosen one learn from half of them and answer the other half.
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
from fides_plugins.training.attacks import AttackRegistry
from fides_plugins.training.costs import Cost, onnx_cost
from fides_plugins.training.data import Dataset, load_data, match_input, split_rows
from fides_plugins.training.detector.calibration import require_rows
from fides_plugins.training.detector.detection import DETECTOR_FILE, DetectionArtifacts, train_on
from fides_plugins.training.detector.readiness import telling_attacks
from fides_plugins.training.distil.augmentation import Augmentation, augment, changes
from fides_plugins.training.distil.distillation import TransferSet, predict
from fides_plugins.training.distil.gdtl import GdtlResult, Search
from fides_plugins.training.distil.students import Student, built_in_students
from fides_plugins.training.distil.workers import Worker
from fides_plugins.training.evaluation.forms import FormCost, form_costs
from fides_plugins.training.export import export_onnx
from fides_plugins.training.kinds import Kind, check_kind, input_kind
from fides_plugins.training.options import FitOptions
from fides_plugins.training.predictions import Predictions, run_graph
from fides_plugins.training.service.teacher import Teacher
from fides_plugins.training.service.teachers import AnswerCache, output_kind
from fides_plugins.types import Float32Array, IntArray

VERIFICATION_FILE = "verification.onnx"
OUTPUT_NAME = "logits"

#: Share of the rows for each part, and the most that it gets; distillation has the rest.
SHARES = {"calibration": 0.25, "selection": 0.10}
MOST = {"calibration": 4_000, "selection": 1_000}
#: Parts of the distillation rows that models like the chosen one are kept from, each in turn.
FOLDS = 2
#: A change is made to copies where the service keeps its class on at least this share of some rows.
KEPT_BY_CHANGE = 0.5
#: So many rows are asked about for it.
CHANGES_TRIED_ON = 128
#: The transfer set never takes more memory than this.
MAX_TRANSFER_BYTES = 1 << 30
MAX_COPIES = 40
#: Copies are fewer where the service would take more multiply-adds to answer them: a minute or two.
MAX_ASKED_MACS = 4e12

#: Called as work goes on: name of the stage, units done, units in all.
Progress = Callable[[str, int, int], None]
#: (rows of the service's tensor, K) -> candidates.
MakeStudents = Callable[[NDArray[Any], int], Sequence[Student]]


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
    kind:
        Of the rows.
    parts:
        "distillation", "selection" and "calibration" to their row indices.
    """

    data: Dataset
    input: InputSpec
    scale: float
    kind: Kind
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
        (n, K) as it gave them, of each part.
    transfer:
        The distillation rows and changed copies of them, answered.
    cost:
        Of the service for one row; None where it cannot be counted.
    changes:
        Changes that were tried on copies, and the share of rows whose class the service kept.
    """

    codec: OutputCodec
    outputs: Mapping[str, Float32Array]
    transfer: TransferSet
    cost: Cost | None
    changes: Mapping[str, float]

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
        What both models answered to the calibration rows.
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
    kind = check_kind(fit.options.input_kind, data.images) if fit.options.input_kind else input_kind(data.images)
    shares = part_shares(data.n_rows)
    parts = split_rows(data.images, shares, fit.seed, data.groups)
    require_rows(len(parts["calibration"]), shares["calibration"], fit.options.false_alarm_rate)
    return SplitData(data, given, scale, kind, parts)


def part_shares(n_rows: int) -> dict[str, float]:
    """The share of the rows that each part gets."""
    shares = {part: min(share, MOST[part] / n_rows) for part, share in SHARES.items()}
    return {"distillation": 1.0 - sum(shares.values()), **shares}


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
    options, rows = fit.options, split.images("distillation")
    cost = fit.teacher.cost(rows)
    copies = _copies(rows, options.transfer_rows, cost) if options.augment else 0
    held = {part: split.images(part) for part in ("selection", "calibration")}
    total = len(rows) * (1 + copies) + sum(map(len, held.values()))
    done = 0

    def ask(asked: NDArray[Any]) -> Float32Array:
        nonlocal done
        raw = fit.teacher.ask(asked, lambda n: fit.tell("ask the service", done + n, total))
        done += len(asked)
        return raw

    # The real rows first: an unusable service or label is found before thousands of copies are answered.
    outputs = {part: ask(asked) for part, asked in held.items()} | {"distillation": ask(rows)}
    split.data.check_labels(outputs["calibration"].shape[1])
    kept = _tried(fit, split, outputs["distillation"]) if copies else {}
    made = Augmentation(flip=options.flip).only([n for n, share in kept.items() if share >= KEPT_BY_CHANGE])
    shown, labels, origins = augment(rows, split.labels("distillation"), copies, fit.seed, made, split.kind)
    raw = outputs["distillation"]
    if len(shown) > len(rows):
        raw = np.concatenate([raw, ask(shown[len(rows) :])])
    codec = OutputCodec(options.output_kind or output_kind(np.concatenate([raw, *outputs.values()])))
    transfer = TransferSet(shown, codec.logits(raw), labels, origins)
    return AnsweredData(codec, outputs, transfer, cost, kept)


def _tried(fit: Fit, split: SplitData, answers: Float32Array) -> dict[str, float]:
    """Each change of the kind, and the share of some rows whose class the service keeps when they are changed so.

    A change under which most rows become something else teaches a student what the service says to nonsense.
    """
    rows = split.images("distillation")
    some = np.random.default_rng(fit.seed).permutation(len(rows))[:CHANGES_TRIED_ON]
    own = answers[some].argmax(axis=1)
    settings = Augmentation(flip=fit.options.flip)
    shares = {}
    for name in changes(split.kind, rows, settings):
        shown, _, _ = augment(rows[some], None, 1, fit.seed, settings.only([name]), split.kind)
        shares[name] = round(float((fit.teacher.ask(shown[len(some) :]).argmax(axis=1) == own).mean()), 4)
    return shares


def _copies(images: NDArray[Any], transfer_rows: int, cost: Cost | None) -> int:
    """Changed copies of each row: as many as are wanted, fit into memory, and are answered before long."""
    wanted = transfer_rows // len(images) - 1
    affordable = MAX_TRANSFER_BYTES // max(1, images[0].size * 4 * len(images)) - 1
    if cost is not None and cost.macs:
        affordable = min(affordable, int(MAX_ASKED_MACS / (cost.macs * len(images))))
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
        candidates: Sequence[Student] = built_in_students(rows, answers.n_classes, parameters, macs, split.kind)
    else:
        candidates = students(rows, answers.n_classes)
    return _search(fit, split, answers, who).run(
        candidates, parameters, macs, lambda share: fit.tell("distil", round(100 * share), 100)
    )


def _search(fit: Fit, split: SplitData, answers: AnsweredData, who: Worker) -> Search:
    return Search(
        answers.transfer,
        split.images("selection"),
        answers.codec.logits(answers.outputs["selection"]),
        fit.options.agreement,
        fit.options.tolerance,
        fit.options.distillation(answers.transfer.logits),
        fit.seed,
        who,
    )


def cross_fit(fit: Fit, split: SplitData, answers: AnsweredData, found: GdtlResult) -> Float32Array:
    """Logits (n, K) of the distillation rows, each by a model like the one found that did not learn from it."""
    rows, groups = split.images("distillation"), split.data.groups
    own_groups = None if groups is None else groups[split.parts["distillation"]]
    folds = split_rows(rows, {str(fold): 1.0 / FOLDS for fold in range(FOLDS)}, fit.seed, own_groups)
    search = _search(fit, split, answers, Worker.alone())
    logits = np.zeros((len(rows), answers.n_classes), np.float32)
    for index, fold in enumerate(folds.values()):

        def report(share: float, index: int = index) -> None:
            fit.tell("cross-fit", round(100 * (index + share) / FOLDS), 100)

        logits[fold] = predict(search.again(found, answers.transfer.without(fold), report), rows[fold])
    return logits


def _least(limit: int | None, other: float) -> int:
    return int(other) if limit is None else min(limit, int(other))


def fit_detection(
    fit: Fit,
    split: SplitData,
    answers: AnsweredData,
    found: GdtlResult,
    attacks: Sequence[str],
    registry: AttackRegistry | None,
) -> FittedDetection:
    """Export the verification model, train detection by cross-fitting, and calibrate it on the graph's own answers.

    Raises
    ------
    TrainingError
        If the graph differs from the model, or the rows cannot be used.
    SettingsError
        If an attack is unknown.
    """
    images = split.images("calibration")
    spec = VerificationSpec(file=VERIFICATION_FILE, input_name=split.input.name, output_name=OUTPUT_NAME)
    graph = export_onnx(found.model, images, spec.input_name, spec.output_name)
    model = OnnxModel(graph, name=spec.file)

    def pairs(parts: Sequence[str], verification: Float32Array) -> Predictions:
        index = np.concatenate([split.parts[part] for part in parts])
        return Predictions.check(
            np.concatenate([answers.outputs[part] for part in parts]),
            verification,
            None if split.data.labels is None else split.data.labels[index],
            service_codec=answers.codec,
            verification_codec=spec.codec,
        )

    def answer(part: str) -> Float32Array:
        return run_graph(model, spec.output_name, **{spec.input_name: split.images(part)})

    training = pairs(
        ("distillation", "selection"), np.concatenate([cross_fit(fit, split, answers, found), answer("selection")])
    )
    held_out = pairs(("calibration",), answer("calibration"))
    artifacts = train_on(
        training,
        attacks=attacks,
        registry=registry,
        false_alarm_rate=fit.options.false_alarm_rate,
        held_out=held_out,
        seed=fit.seed,
        progress=lambda share: fit.tell("train detection", round(100 * share), 100),
    )
    detector = OnnxModel(artifacts.detector_onnx, name=DETECTOR_FILE)
    forms = form_costs(detector, held_out, telling_attacks(), fit.options.false_alarm_rate, fit.seed)
    told = answers.codec.coarse_form(answers.outputs["calibration"])
    return FittedDetection(graph, spec, onnx_cost(graph, images.shape[1:]), held_out, artifacts, told, forms)
