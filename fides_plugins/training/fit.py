"""From a service model and data to a bundle: `fides fit`.

The rows are cut into three disjoint parts: for distillation, for choosing among students, and for
detection, of which `train_detection` again keeps a part that only calibrates. No part sees another's rows,
so what is reported as agreement and as false-alarm budget holds for rows that nothing was trained on.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fides_plugins.bundle import (
    Bundle,
    InputSpec,
    Manifest,
    ServiceSpec,
    VerificationSpec,
    check_target,
    write_bundle,
)
from fides_plugins.onnx_model import OnnxModel
from fides_plugins.training.attacks import AttackRegistry
from fides_plugins.training.costs import Cost, onnx_cost
from fides_plugins.training.data import Dataset, load_data, match_input, split_rows
from fides_plugins.training.detector.calibration import require_rows
from fides_plugins.training.detector.detection import train_detection
from fides_plugins.training.distil.distillation import (
    ALONE,
    Alone,
    Augmentation,
    DistillationSettings,
    TransferSet,
    agreement,
    augment,
)
from fides_plugins.training.distil.gdtl import GdtlResult, GdtlSettings, search
from fides_plugins.training.distil.students import Student, built_in_students
from fides_plugins.training.export import export_onnx
from fides_plugins.training.fit_report import FitReport
from fides_plugins.training.service.teacher import Teacher
from fides_plugins.training.service.teachers import AnswerCache, as_logits, load_teacher, output_kind
from fides_plugins.types import Float32Array, IntArray, OutputKind, softmax

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


def fit_service(
    service: str | Teacher,
    data: str | Path | Dataset,
    out: str | Path,
    *,
    seed: int = 0,
    options: FitOptions | None = None,
    students: Callable[[NDArray[Any], int], Sequence[Student]] | None = None,
    attacks: Sequence[str] | None = None,
    registry: AttackRegistry | None = None,
    cache: str | Path | None = None,
    name: str = "fides",
    bundle_version: int = 1,
    input_name: str = "",
    output_name: str = "",
    encoding: str = "json",
    request_key: str = "",
    response_key: str = "",
    progress: Progress | None = None,
    who: Alone = ALONE,
) -> FitReport:
    """Make a bundle that protects a service.

    Parameters
    ----------
    service:
        What `load_teacher` understands, or a teacher. One that was loaded here is closed again.
    data:
        What `load_data` understands, or a dataset. Labels are used where they are there.
    out:
        Folder of the bundle; an existing bundle there is replaced.
    seed:
        Decides split, copies, weights and attacks: the same seed on the same machine gives the same graphs.
    students:
        (rows of the service's tensor, K) -> candidates; the built-in family by default.
    attacks, registry:
        For `train_detection`.
    cache:
        Folder for the service's answers, kept. By default they lie beside `out` until the fit has succeeded.
    input_name, output_name, encoding, request_key, response_key:
        For `load_teacher`.
    progress:
        See `Progress`.
    who:
        Who trains. Among several workers each calls this function with the same arguments, on a shared file
        system; the first one asks the service and writes the bundle, and every one gets its report.

    Raises
    ------
    TrainingError
        If service or data cannot be used, or the rows are too few for the budget (says how many are needed).
    BundleError
        If something that is no bundle is in the way.
    """
    check_target(out)
    chosen = options or FitOptions()
    teacher = (
        load_teacher(
            service,
            input_name=input_name,
            output_name=output_name,
            encoding=encoding,
            request_key=request_key,
            response_key=response_key,
        )
        if isinstance(service, str)
        else service
    )
    kept = Path(cache) if cache is not None else Path(out).parent / f".{Path(out).name}.answers"
    try:
        fit = _Fit(teacher, chosen, seed, AnswerCache(teacher, kept), progress or (lambda stage, done, total: None))
        with who.first_before_others():
            fit.read(data)
        result = fit.distil(students, who)
        report: FitReport = who.agree(
            fit.write(result, Path(out), name, bundle_version, attacks, registry) if who.first else None
        )
    finally:
        if isinstance(service, str):
            teacher.close()
    if cache is None and who.first:
        shutil.rmtree(kept, ignore_errors=True)
    return report


class _Fit:
    """The state of one fit, stage by stage."""

    def __init__(
        self, teacher: Teacher, options: FitOptions, seed: int, cache: AnswerCache, progress: Progress
    ) -> None:
        self.teacher, self.options, self.seed, self.cache, self.progress = teacher, options, seed, cache, progress
        self.seconds: dict[str, float] = {}

    def read(self, source: str | Path | Dataset) -> None:
        """Data, split, and the service's answers."""
        began = time.perf_counter()
        data = source if isinstance(source, Dataset) else load_data(source, self.teacher.input)
        data, self.scale = match_input(data, self._spec(data), self.options.scale)
        self.data = data
        self.input = InputSpec(
            name=self._spec(data).name, dtype=data.images.dtype.name, shape=(None, *data.images.shape[1:])
        )
        self.parts = split_rows(data.images, SHARES, self.seed)
        detection = len(self.parts["detection"])
        require_rows(
            int(CALIBRATION_FRACTION * detection),
            CALIBRATION_FRACTION * SHARES["detection"],
            self.options.false_alarm_rate,
        )
        first = self.parts["distillation"]
        labels = None if data.labels is None else data.labels[first]
        copies = self._copies(data.images[first])
        shown, answers = augment(data.images[first], labels, copies, self.seed, Augmentation(flip=self.options.flip))
        held = {part: data.images[self.parts[part]] for part in ("selection", "detection")}
        total = len(shown) + sum(map(len, held.values()))
        done = 0

        def ask(images: NDArray[Any]) -> Float32Array:
            nonlocal done
            raw = self.cache.answers(images, lambda n: self.progress("ask the service", done + n, total))
            done += len(images)
            return raw

        # The real rows first: an unusable service or label is found before thousands of copies are answered.
        outputs = {part: ask(images) for part, images in held.items()}
        self.n_classes = int(outputs["detection"].shape[1])
        data.check_labels(self.n_classes)
        raw = ask(shown)
        self.kind: OutputKind = self.options.output_kind or output_kind(np.concatenate([raw, *outputs.values()]))
        self.service_logits = {part: as_logits(output, self.kind) for part, output in outputs.items()}
        self.transfer = TransferSet(shown, as_logits(raw, self.kind), answers)
        self.copies = copies
        self.seconds["answers"] = time.perf_counter() - began

    def _spec(self, data: Dataset) -> InputSpec:
        if self.teacher.input is not None:
            return self.teacher.input
        dtype = "float32" if data.images.dtype == np.float64 else data.images.dtype.name
        return InputSpec(
            name=getattr(self.teacher, "input_name", "input"), dtype=dtype, shape=(None, *data.images.shape[1:])
        )

    def _copies(self, images: NDArray[Any]) -> int:
        wanted = self.options.transfer_rows // len(images) - 1
        affordable = MAX_TRANSFER_BYTES // max(1, images[0].size * 4 * len(images)) - 1
        return int(np.clip(min(wanted, affordable), 0, MAX_COPIES))

    def distil(self, students: Callable[[NDArray[Any], int], Sequence[Student]] | None, who: Alone) -> GdtlResult:
        """The greedy search for a verification model."""
        began = time.perf_counter()
        rows = self.transfer.images
        self.service_cost = self.teacher.cost(rows)
        macs, parameters = self.options.max_macs, self.options.max_parameters
        if self.service_cost is not None:
            macs = _least(macs, self.options.max_cost * self.service_cost.macs)
            parameters = _least(parameters, self.options.max_size * self.service_cost.parameters)
        if students is None:
            candidates: Sequence[Student] = built_in_students(rows, self.n_classes, parameters, macs)
        else:
            candidates = students(rows, self.n_classes)
        result = search(
            candidates,
            self.transfer,
            self.data.images[self.parts["selection"]],
            self.service_logits["selection"],
            settings=GdtlSettings(agreement=self.options.agreement, tolerance=self.options.tolerance),
            distillation=self.options.distillation(),
            max_parameters=parameters,
            max_macs=macs,
            seed=self.seed,
            progress=lambda share: self.progress("distil", round(100 * share), 100),
            who=who,
        )
        self.seconds["distillation"] = time.perf_counter() - began
        return result

    def write(
        self,
        result: GdtlResult,
        out: Path,
        name: str,
        bundle_version: int,
        attacks: Sequence[str] | None,
        registry: AttackRegistry | None,
    ) -> FitReport:
        """Detection, bundle and report."""
        began = time.perf_counter()
        rows = self.parts["detection"]
        images = self.data.images[rows]
        graph = export_onnx(result.model, images, self.input.name, OUTPUT_NAME)
        model = OnnxModel(graph, name=VERIFICATION_FILE)
        # The graph that will serve gives the answers that detection is trained on.
        logits = np.concatenate(
            [model.run({self.input.name: images[i : i + 512]})[OUTPUT_NAME] for i in range(0, len(images), 512)]
        )
        labels = None if self.data.labels is None else self.data.labels[rows]
        chosen: dict[str, Any] = {} if attacks is None else {"attacks": tuple(attacks)}
        artifacts = train_detection(
            softmax(self.service_logits["detection"]),
            softmax(logits),
            labels,
            registry=registry,
            false_alarm_rate=self.options.false_alarm_rate,
            calibration_fraction=CALIBRATION_FRACTION,
            seed=self.seed,
            progress=lambda share: self.progress("train detection", round(100 * share), 100),
            **chosen,
        )
        self.seconds["detection"] = time.perf_counter() - began
        counts = {part: len(index) for part, index in self.parts.items()}
        counts |= {"transfer": self.transfer.n_rows, "calibration": int(artifacts.provenance["calibration_rows"])}
        agreed = agreement(self.service_logits["detection"], logits)
        verification_cost = onnx_cost(graph, images.shape[1:])
        manifest = Manifest(
            name=name,
            bundle_version=bundle_version,
            class_names=self.data.class_names or tuple(str(i) for i in range(self.n_classes)),
            input=self.input,
            service=ServiceSpec(output_kind=self.kind),
            verification=VerificationSpec(
                file=VERIFICATION_FILE, input_name=self.input.name, output_name=OUTPUT_NAME, output_kind="logits"
            ),
            provenance={
                "service": {
                    "name": self.teacher.name,
                    "sha256": self.teacher.digest,
                    "cost": _plain(self.service_cost),
                },
                "data": {"sha256": self.data.digest, "rows": self.data.n_rows, "scale": self.scale},
                "rows": counts,
                "seed": self.seed,
                "options": asdict(self.options),
                "verification": {
                    "student": result.student,
                    "cost": _plain(verification_cost),
                    "agreement": round(agreed, 6),
                    "wanted_agreement_reached": result.reached,
                    "steps": [s.as_dict() for s in result.steps],
                },
                "detection": artifacts.provenance,
                "versions": {
                    p: metadata.version(p) for p in ("fides-plugins", "torch", "onnx", "onnxruntime", "numpy")
                },
            },
            **artifacts.manifest_parts(),
        )
        bundle: Bundle = write_bundle(out, manifest, {VERIFICATION_FILE: graph, **artifacts.files()})
        self.progress("write the bundle", 1, 1)
        return FitReport(
            bundle=str(out),
            digest=bundle.digest,
            service=self.teacher.name,
            service_cost=self.service_cost,
            verification_cost=verification_cost,
            student=result.student,
            steps=result.steps,
            reached=result.reached,
            agreement=agreed,
            service_accuracy=_accuracy(self.service_logits["detection"], labels),
            verification_accuracy=_accuracy(logits, labels),
            rows=counts,
            asked=self.cache.asked,
            remembered=self.cache.remembered,
            scale=self.scale,
            seconds={stage: round(s, 1) for stage, s in self.seconds.items()},
        )


def _least(limit: int | None, other: float) -> int:
    return int(other) if limit is None else min(limit, int(other))


def _plain(cost: Cost | None) -> dict[str, int] | None:
    return None if cost is None else asdict(cost)


def _accuracy(logits: Float32Array, labels: IntArray | None) -> float | None:
    return None if labels is None else float((logits.argmax(axis=1) == labels).mean())
