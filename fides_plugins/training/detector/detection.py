"""From a pair of predictions to everything a bundle needs for detection."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fides_plugins.bundle import (
    Bundle,
    CalibrationSpec,
    GraphSpec,
    Manifest,
    ServiceSpec,
    calibration_file,
    write_bundle,
)
from fides_plugins.errors import TrainingError
from fides_plugins.onnx_model import OnnxModel
from fides_plugins.readiness import KEY
from fides_plugins.statistics.conformal import Calibration
from fides_plugins.training.attacks import (
    DEFAULT_OUTPUT_ATTACKS,
    GENERATOR,
    AttackRegistry,
    default_registry,
)
from fides_plugins.training.detector.calibration import LEARNED, balanced_threshold, benign_scores, require_rows
from fides_plugins.training.detector.readiness import measure_readiness
from fides_plugins.training.predictions import Predictions, load_predictions
from fides_plugins.types import Float32Array

DETECTOR_FILE = "detector.onnx"
RECLASSIFIER_FILE = "reclassifier.onnx"
GENERATOR_FILE = "generator.onnx"
CALIBRATION_FILE = "calibration.json"

#: Share of the rows kept away from training and used to calibrate.
CALIBRATION_FRACTION = 0.2
#: Below this many rows to train on, the networks have nothing to learn from.
MIN_TRAINING_ROWS = 64


@dataclass(frozen=True)
class DetectionArtifacts:
    """What `train_on` gives; `manifest_parts()` and `files()` go into a bundle as they are.

    Attributes
    ----------
    detector_onnx, reclassifier_onnx:
        Graphs from `service`, `verification` (N, K) to `score` (N,), and to `probabilities`, `truth`
        (N, K). `score` is 0.5 at the balanced threshold.
    generator_onnx:
        Graph from `service`, `noise` (N, K) to `attacked` (N, K), or None where training had no generator.
        Used by `fides evaluate` only.
    calibrations:
        Benign scores of held-out rows by detector: "learned" and every named divergence.
    false_alarm_rate:
        The budget the rows were checked to support.
    provenance:
        JSON: seeds, row counts, temperatures, attacks, agreement.
    readiness:
        JSON of `readiness.Readiness`.
    """

    detector_onnx: bytes
    reclassifier_onnx: bytes
    generator_onnx: bytes | None
    calibrations: Mapping[str, Float32Array]
    false_alarm_rate: float
    provenance: dict[str, Any] = field(default_factory=dict)
    readiness: dict[str, Any] = field(default_factory=dict)

    def files(self) -> dict[str, bytes]:
        """File name to bytes."""
        files = {
            DETECTOR_FILE: self.detector_onnx,
            RECLASSIFIER_FILE: self.reclassifier_onnx,
            CALIBRATION_FILE: calibration_file(self.calibrations),
        }
        return files if self.generator_onnx is None else {**files, GENERATOR_FILE: self.generator_onnx}

    def manifest_parts(self) -> dict[str, Any]:
        """`detector`, `reclassifier` and `calibration` for `bundle.Manifest`."""
        rate = self.false_alarm_rate
        calibrations = {name: Calibration(scores) for name, scores in self.calibrations.items()}
        return {
            "detector": GraphSpec(file=DETECTOR_FILE),
            "reclassifier": GraphSpec(file=RECLASSIFIER_FILE),
            "calibration": CalibrationSpec(
                file=CALIBRATION_FILE,
                n_rows=calibrations[LEARNED].n,
                false_alarm_rate=rate,
                thresholds={name: c.threshold(rate) for name, c in calibrations.items()},
            ),
        }


def train_on(
    rows: Predictions,
    *,
    attacks: Sequence[str] = (*DEFAULT_OUTPUT_ATTACKS, GENERATOR),
    registry: AttackRegistry | None = None,
    false_alarm_rate: float = 0.01,
    held_out: Predictions | None = None,
    seed: int = 0,
    progress: Callable[[float], None] | None = None,
) -> DetectionArtifacts:
    """Train detector, re-classifier and generator, export and calibrate them.

    Parameters
    ----------
    rows:
        Both models' answers as the pipeline will see them, on rows that neither model was trained on: agreement on
        training rows is too good, and the calibration with it. With labels the re-classifier also learns the truth.
    attacks:
        Names to train on. `generator` among them or not decides about the GAN's generator.
    registry:
        Where the names are looked up; the built-in attacks by default.
    false_alarm_rate:
        The smallest budget that the calibration must support.
    held_out:
        Rows that calibrate and train nothing; by default a share of `rows` is kept for it.
    seed:
        Decides the split, the attacks and the training.
    progress:
        Told the share of the work done, 0 to 1.

    Raises
    ------
    TrainingError
        If the rows are unusable or too few; says how many are needed.
    SettingsError
        If an attack is unknown.
    """
    import numpy as np
    import torch

    from fides_plugins.training.detector.adversarial import GanOptions, train_gan
    from fides_plugins.training.detector.networks import DetectorGraph, ReclassifierGraph, export

    known = registry or default_registry()
    chosen = [known.output(name) for name in attacks if name != GENERATOR]
    training = rows
    if held_out is None:
        training, held_out = rows.split(CALIBRATION_FRACTION, seed)
        require_rows(held_out.n_rows, CALIBRATION_FRACTION, false_alarm_rate)
    if training.n_rows < MIN_TRAINING_ROWS:
        raise TrainingError(
            f"{training.n_rows} rows are left for training; at least {MIN_TRAINING_ROWS} are needed.",
            "Give more rows.",
        )
    options = GanOptions(generator=GENERATOR in attacks)
    networks = train_gan(training, chosen, seed, options, progress)

    # The balanced threshold moves to a score of 0.5, so that it needs no place of its own.
    rng = np.random.default_rng((seed, 1))
    with torch.no_grad():
        plain = DetectorGraph(networks.scaling, networks.detector, 0.0).eval()

        def ranks(service: Float32Array, verification: Float32Array) -> Float32Array:
            pieces = [
                plain.ranks(*(torch.from_numpy(np.array(side[i : i + 1024])) for side in (service, verification)))
                for i in range(0, len(service), 1024)
            ]
            return np.asarray(torch.cat(pieces).numpy(), np.float32)

        attacked = {}
        for attack in chosen:
            if attack.changes_label:
                lies, changed = attack.apply(held_out.service, rng)
                if changed.any():
                    attacked[attack.name] = ranks(lies[changed], np.ascontiguousarray(held_out.verification[changed]))
        threshold = balanced_threshold(ranks(held_out.service, held_out.verification), attacked)
    detector = export(
        DetectorGraph(networks.scaling, networks.detector, threshold), ("service", "verification"), ("score",)
    )
    reclassifier = export(
        ReclassifierGraph(networks.scaling, networks.reclassifier, networks.with_truth),
        ("service", "verification"),
        ("probabilities", "truth"),
    )
    generator = export(networks.generator, ("service", "noise"), ("attacked",)) if GENERATOR in attacks else None
    models = OnnxModel(detector, name=DETECTOR_FILE), OnnxModel(reclassifier, name=RECLASSIFIER_FILE)
    return DetectionArtifacts(
        detector_onnx=detector,
        reclassifier_onnx=reclassifier,
        generator_onnx=generator,
        calibrations=benign_scores(models[0], held_out),
        false_alarm_rate=false_alarm_rate,
        readiness=measure_readiness(*models, held_out, false_alarm_rate, seed).model_dump(),
        provenance={
            "seed": seed,
            "attacks": list(attacks),
            "training_rows": training.n_rows,
            "calibration_rows": held_out.n_rows,
            "labels": rows.labels is not None,
            "agreement": round(rows.agreement, 6),
            "temperature_service": round(networks.scaling.temperatures[0], 6),
            "temperature_verification": round(networks.scaling.temperatures[1], 6),
        },
    )


def fit_predictions(
    path: str | Path,
    out: str | Path,
    *,
    class_names: Sequence[str] | None = None,
    name: str = "fides",
    attacks: Sequence[str] = (*DEFAULT_OUTPUT_ATTACKS, GENERATOR),
    registry: AttackRegistry | None = None,
    false_alarm_rate: float = 0.01,
    seed: int = 0,
    progress: Callable[[float], None] | None = None,
) -> Bundle:
    """`fides fit --predictions P.npz --out BUNDLE`: a bundle without a verification model.

    Raises
    ------
    TrainingError
        If the file is unusable, has too few rows, or the class names don't fit.
    """
    rows = load_predictions(path)
    names = tuple(class_names or (str(i) for i in range(rows.n_classes)))
    if len(names) != rows.n_classes:
        raise TrainingError(f"{len(names)} class names for {rows.n_classes} classes.", "Give one name per class.")
    artifacts = train_on(
        rows, attacks=attacks, registry=registry, false_alarm_rate=false_alarm_rate, seed=seed, progress=progress
    )
    manifest = Manifest(
        name=name,
        class_names=names,
        service=ServiceSpec(output_kind=rows.service_codec.kind, temperature=rows.service_codec.temperature),
        provenance={"predictions": Path(path).name, "detection": artifacts.provenance, KEY: artifacts.readiness},
        **artifacts.manifest_parts(),
    )
    return write_bundle(out, manifest, artifacts.files())
