"""From a service model and data to a bundle: `fides fit`."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

from fides_plugins.bundle import Bundle, Manifest, ServiceSpec, check_target, write_bundle
from fides_plugins.readiness import KEY
from fides_plugins.training.attacks import DEFAULT_OUTPUT_ATTACKS, GENERATOR, AttackRegistry
from fides_plugins.training.data import Dataset
from fides_plugins.training.distil.gdtl import GdtlResult
from fides_plugins.training.distil.workers import Worker
from fides_plugins.training.fit_report import FitReport
from fides_plugins.training.kinds import describe
from fides_plugins.training.options import FitOptions
from fides_plugins.training.service.teacher import Teacher
from fides_plugins.training.service.teachers import AnswerCache, load_teacher
from fides_plugins.training.stages import (
    VERIFICATION_FILE,
    AnsweredData,
    Fit,
    FittedDetection,
    MakeStudents,
    Progress,
    SplitData,
    collect_answers,
    distil_model,
    fit_detection,
    split_data,
)
from fides_plugins.types import Float32Array, IntArray

__all__ = ["FitOptions", "fit_service"]


def fit_service(
    service: str | Teacher,
    data: str | Path | Dataset,
    out: str | Path,
    *,
    seed: int = 0,
    options: FitOptions | None = None,
    students: MakeStudents | None = None,
    attacks: Sequence[str] = (*DEFAULT_OUTPUT_ATTACKS, GENERATOR),
    registry: AttackRegistry | None = None,
    cache: str | Path | None = None,
    name: str = "fides",
    bundle_version: int = 1,
    progress: Progress | None = None,
    who: Worker | None = None,
) -> FitReport:
    """Make a bundle that protects a service.

    Parameters
    ----------
    service:
        What `load_teacher` understands without more being said, or a teacher. One that was loaded here is closed again.
    data:
        What `load_data` understands, or a dataset. Labels are used where they are there.
    out:
        Folder of the bundle; an existing bundle there is replaced.
    seed:
        Decides split, copies, weights and attacks: the same seed on the same machine gives the same graphs.
    students:
        (rows of the service's tensor, K) -> candidates; the built-in family by default.
    attacks, registry:
        For `train_on`.
    cache:
        Folder for the service's answers, kept. By default they lie beside `out` until the fit has succeeded.
    progress:
        See `Progress`.
    who:
        Who trains; this process alone by default. Among several workers each calls this function with the same
        arguments, on a shared file system; the first one asks the service and writes the bundle, and every one gets
        its report.

    Raises
    ------
    TrainingError
        If service or data cannot be used, or the rows are too few for the budget (says how many are needed).
    BundleError
        If something that is no bundle is in the way.
    """
    check_target(out)
    who = who or Worker()
    teacher = load_teacher(service) if isinstance(service, str) else service
    kept = Path(cache) if cache is not None else Path(out).parent / f".{Path(out).name}.answers"
    fit = Fit(AnswerCache(teacher, kept), options or FitOptions(), seed, progress or (lambda stage, done, total: None))
    seconds: dict[str, float] = {}
    report: FitReport | None = None
    try:
        with who.first_before_others(), _timed(seconds, "answers"):
            split = split_data(fit, data)
            answers = collect_answers(fit, split)
        with _timed(seconds, "distillation"):
            found = distil_model(fit, split, answers, students, who)
        if who.first:
            with _timed(seconds, "detection"):
                detection = fit_detection(fit, split, answers, found, attacks, registry)
            made = _Made(fit, split, answers, found, detection)
            files = {VERIFICATION_FILE: detection.graph, **detection.artifacts.files()}
            bundle = write_bundle(out, made.manifest(name, bundle_version), files)
            fit.tell("write the bundle", 1, 1)
            report = made.report(out, bundle, seconds)
        agreed: FitReport = who.agree(report)
    finally:
        if isinstance(service, str):
            teacher.close()
    if cache is None and who.first:
        shutil.rmtree(kept, ignore_errors=True)
    return agreed


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Note how long a stage took."""
    began = time.perf_counter()
    yield
    seconds[stage] = round(time.perf_counter() - began, 1)


@dataclass(frozen=True, eq=False)
class _Made:
    """All stages of one fit, and what is told about them."""

    fit: Fit
    split: SplitData
    answers: AnsweredData
    found: GdtlResult
    detection: FittedDetection

    def rows(self) -> dict[str, int]:
        """Number of rows in each part."""
        counts = {part: len(index) for part, index in self.split.parts.items()}
        return {**counts, "transfer": self.answers.transfer.n_rows}

    def manifest(self, name: str, bundle_version: int) -> Manifest:
        """Of the bundle, without its files."""
        split, found, n_classes = self.split, self.found, self.answers.n_classes
        return Manifest(
            name=name,
            bundle_version=bundle_version,
            class_names=split.data.class_names or tuple(str(i) for i in range(n_classes)),
            input=split.input,
            service=ServiceSpec(output_kind=self.answers.codec.kind),
            verification=self.detection.spec,
            provenance={
                "service": {
                    "name": self.fit.teacher.name,
                    "sha256": self.fit.teacher.digest,
                    "cost": self.answers.cost and asdict(self.answers.cost),
                },
                "data": {
                    "sha256": split.data.digest,
                    "rows": split.data.n_rows,
                    "scale": split.scale,
                    "kind": split.kind,
                },
                "rows": self.rows(),
                "seed": self.fit.seed,
                "options": asdict(self.fit.options),
                "verification": {
                    "student": found.student,
                    "cost": asdict(self.detection.cost),
                    "agreement": round(self.detection.rows.agreement, 6),
                    "wanted_agreement_reached": found.reached,
                    "steps": [asdict(s) for s in found.steps],
                },
                "detection": self.detection.artifacts.provenance,
                KEY: self.detection.artifacts.readiness,
                "versions": {
                    p: metadata.version(p) for p in ("fides-plugins", "torch", "onnx", "onnxruntime", "numpy")
                },
            },
            **self.detection.artifacts.manifest_parts(),
        )

    def report(self, out: str | Path, bundle: Bundle, seconds: dict[str, float]) -> FitReport:
        """What was made, and how well it does."""
        teacher, found, rows = self.fit.teacher, self.found, self.detection.rows
        return FitReport(
            bundle=str(out),
            digest=bundle.digest,
            service=teacher.name,
            service_cost=self.answers.cost,
            verification_cost=self.detection.cost,
            student=found.student,
            steps=found.steps,
            reached=found.reached,
            agreement=rows.agreement,
            service_accuracy=_accuracy(rows.service, rows.labels),
            verification_accuracy=_accuracy(rows.verification, rows.labels),
            rows=self.rows(),
            asked=teacher.asked,
            remembered=teacher.remembered,
            scale=self.split.scale,
            kind=describe(self.split.kind, self.split.data.images),
            changes=dict(self.answers.changes),
            readiness=self.detection.artifacts.readiness,
            told_form=self.detection.told_form,
            forms=self.detection.forms,
            seconds=seconds,
        )


def _accuracy(answers: Float32Array, labels: IntArray | None) -> float | None:
    return None if labels is None else float((answers.argmax(axis=1) == labels).mean())
