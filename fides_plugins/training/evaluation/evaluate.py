"""How good is a bundle's detection? Measured on rows that nothing was trained on, with intervals.

Definitions (JSON keys):

- `accuracy`, `f1`: benign and attacked rows 1 : 1, attacked when the score is above 0.5, the balanced
  threshold that was chosen on calibration rows for the mean of the label-changing attacks.
- `auroc`; `tpr_at_fpr_x`: true alarms at the lowest threshold with at most a share x of false alarms here;
  None with fewer than 1/x benign rows, of which not one could be a false alarm.
- `detected`: true alarms at the calibrated threshold, that is p-value <= false-alarm rate.
- `recovered_service`: of all attacked rows, those whose corrected class (top of the re-classifier's
  `probabilities`) is the one the un-attacked service chose.
- `recovered_truth`: of all attacked rows, those where the top of its `truth` output is the label. The
  service is not always right, so one answer can't be both; `recovered_truth_by_service` says how often
  the first output is the label.
- `unseen`: the same after training again without that attack.
- `escalation`: the same where the most doubtful rows are asked again, see `escalation`.
- `comparison`: learned minus rule of thumb at equal false-alarm rate, paired by row; `no_worse` unless the
  interval of the difference lies below zero, None where there is nothing to compare.
- `notes`: what the rows were too few for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fides_plugins.bundle import Bundle
from fides_plugins.errors import InputError, TrainingError
from fides_plugins.onnx_model import OnnxModel
from fides_plugins.statistics.conformal import Calibration, rows_needed
from fides_plugins.training.attacks import DEFAULT_OUTPUT_ATTACKS, GENERATOR, AttackRegistry, OutputAttack
from fides_plugins.training.detector.calibration import LEARNED, require_rows
from fides_plugins.training.detector.detection import CALIBRATION_FRACTION, GENERATOR_FILE, DetectionArtifacts, train_on
from fides_plugins.training.evaluation.comparison import FPR_LEVELS, compare, rule_scores
from fides_plugins.training.evaluation.escalation import escalate_attack, escalate_clean
from fides_plugins.training.evaluation.measures import Estimate, Scores, bootstrap_weights
from fides_plugins.training.evaluation.monitor_study import MonitorStudy, study_monitor
from fides_plugins.training.predictions import AttackedRows, Predictions, run_graph
from fides_plugins.types import Float32Array, IntArray

MEASURES = (
    "accuracy",
    "f1",
    "auroc",
    "tpr_at_fpr_0.01",
    "tpr_at_fpr_0.05",
    "detected",
    "recovered_service",
    "recovered_truth",
)
#: The share of rows that train again for `unseen` where no rows of the fit are given.
UNSEEN_TRAINING_SHARE = 0.5

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class LearnedDetection:
    """A detector with its re-classifier and calibration."""

    detector: OnnxModel
    reclassifier: OnnxModel
    calibration: Calibration

    @classmethod
    def of_bundle(cls, bundle: Bundle) -> LearnedDetection:
        """The bundle's learned detection.

        Raises
        ------
        TrainingError
            If the bundle has no learned detector, re-classifier or calibration.
        """
        manifest = bundle.manifest
        known = bundle.calibrations()
        if manifest.detector is None or manifest.reclassifier is None or LEARNED not in known:
            raise TrainingError("The bundle holds no learned detection to evaluate.", "Make it with `fides fit`.")
        return cls(bundle.model(manifest.detector), bundle.model(manifest.reclassifier), known[LEARNED])

    @classmethod
    def of_artifacts(cls, artifacts: DetectionArtifacts) -> LearnedDetection:
        """Freshly trained detection."""
        return cls(
            OnnxModel(artifacts.detector_onnx),
            OnnxModel(artifacts.reclassifier_onnx),
            Calibration(artifacts.calibrations[LEARNED]),
        )

    def score(self, service: Float32Array, verification: Float32Array) -> Float32Array:
        """(N,) scores."""
        return run_graph(self.detector, "score", service=service, verification=verification)


@dataclass(frozen=True)
class Details:
    """One attack, row by row.

    Attributes
    ----------
    roc:
        By rule ("learned", "disagreement", "kl"): false-alarm and true-alarm rates.
    benign, attacked:
        (n,), (m,) scores.
    rows:
        (m,) clean row behind each attacked one.
    claimed, verified, corrected:
        (m,) class indices: the lie, the verification model's class, the re-classifier's.
    """

    roc: dict[str, tuple[list[float], list[float]]]
    benign: Float32Array
    attacked: Float32Array
    rows: IntArray
    claimed: IntArray
    verified: IntArray
    corrected: IntArray


@dataclass
class Evaluation:
    """What was measured.

    Attributes
    ----------
    result:
        JSON, keys as in the module's description.
    details:
        Per attack, for the report.
    """

    result: dict[str, Any]
    details: dict[str, Details] = field(default_factory=dict)


def evaluate(
    bundle: Bundle,
    rows: Predictions,
    *,
    registry: AttackRegistry,
    fit_rows: Predictions | None = None,
    extra: Sequence[AttackedRows] = (),
    false_alarm_rate: float | None = None,
    monitor_error: float = 1e-6,
    unseen: bool = True,
    seed: int = 0,
    progress: Progress | None = None,
) -> Evaluation:
    """Evaluate a bundle's detection.

    Parameters
    ----------
    bundle:
        With detector, re-classifier and calibration.
    rows:
        Clean pairs that the bundle was not fitted on.
    registry:
        Every output attack in it is tried; the bundle's generator joins them.
    fit_rows:
        Rows to train on again for `unseen`; without them a half of `rows` is spent on it, and `unseen` is
        measured on the other half.
    extra:
        Attacks made elsewhere (on inputs, on the model).
    false_alarm_rate:
        Budget for `detected`; the bundle's own by default.
    monitor_error:
        Error of the sequence test.
    unseen:
        Whether to train again without each attack.
    seed:
        Of attacks, bootstrap and training.
    progress:
        Told what is being done, and the share done.

    Raises
    ------
    InputError
        If the rows are too few to measure any false-alarm rate, or the budget needs more calibration rows.
    TrainingError
        If the rows' class count is not the bundle's, or the rows are too few to train again on.
    """
    if rows.n_classes != bundle.n_classes:
        raise TrainingError(
            f"The predictions have {rows.n_classes} classes, the bundle {bundle.n_classes}.",
            "Evaluate with predictions of the very models that the bundle protects.",
        )
    notes = check_rows("attacks", rows.n_rows)
    tell = progress or (lambda what, done: None)
    judge = LearnedDetection.of_bundle(bundle)
    spec = bundle.manifest.calibration
    rate = false_alarm_rate if false_alarm_rate is not None else (spec.false_alarm_rate if spec else 0.01)
    bundle.calibration(LEARNED, rate)
    training, judged = (fit_rows, rows) if fit_rows is not None else rows.split(UNSEEN_TRAINING_SHARE, seed)
    if unseen:
        # Before anything is measured: training would refuse these rows only after all else was done.
        share = 1.0 if fit_rows is not None else 1.0 - UNSEEN_TRAINING_SHARE
        require_rows(int(CALIBRATION_FRACTION * training.n_rows), CALIBRATION_FRACTION * share, rate)
        notes += check_rows("unseen", judged.n_rows)
    outputs = [registry.output(name) for name in registry.names("output")]
    if GENERATOR_FILE in bundle.file_names:
        outputs.append(generator_attack(bundle.file(GENERATOR_FILE)))
    tell("attacking", 0.0)
    attacked = [*attack_all(rows, outputs, seed), *extra]
    weights = bootstrap_weights(rows.n_rows, seed)
    clean_p = judge.calibration.p_value(judge.score(rows.service, rows.verification))
    clean = {
        "rows": rows.n_rows,
        "classes": rows.n_classes,
        "budget": rate,
        **Estimate.share(clean_p <= rate).to_json("false_alarm_rate"),
        **agreement_measures(rows),
        "escalation": escalate_clean(clean_p, rows.service, rate, _verification_cost(bundle.manifest.provenance)),
    }
    result: dict[str, Any] = {"clean": clean, "notes": notes, "attacks": {}, "unseen": {}}
    result["comparison"] = {"seen": {}, "unseen": {}}
    details: dict[str, Details] = {}
    for i, attack in enumerate(attacked):
        tell(f"attack {attack.name}", i / len(attacked))
        measured = measure(judge, rows, attack, weights, rate)
        result["attacks"][attack.name] = measured.values
        result["comparison"]["seen"][attack.name] = measured.comparison
        details[attack.name] = measured.details
    if unseen:
        _unseen(result, training, judged, outputs, registry, rate, seed, tell)
    tell("monitor", 0.0)
    switched = next((a for a in attacked if a.name == "switch"), attacked[0])
    result["monitor"] = study_monitor(
        clean_p,
        judge.calibration.p_value(judge.score(switched.service, switched.verification)),
        judge.calibration.n,
        MonitorStudy(error=monitor_error, seed=seed),
    )
    result["monitor"]["attack"] = switched.name
    return Evaluation(result, details)


def check_rows(section: str, n: int) -> list[str]:
    """A sentence for each measure of a section for which its `n` benign rows are too few.

    Raises
    ------
    InputError
        If a single false alarm would be above the highest of `FPR_LEVELS`.
    """
    # One row more than calibration needs: there the row that is judged counts, too.
    needed = {level: rows_needed(level) + 1 for level in FPR_LEVELS}
    least, most = min(needed.values()), max(needed.values())
    if n < least:
        raise InputError(
            f"A false-alarm rate of {max(FPR_LEVELS):g} needs at least {least} benign rows to be measured; "
            f"`{section}` is judged on {n}.",
            f"Give at least {least} of them, {most} for every measure.",
        )
    return [
        f"tpr_at_fpr_{level:g} of `{section}` needs at least {rows} benign rows; it is judged on {n}."
        for level, rows in needed.items()
        if n < rows
    ]


def generator_attack(graph: bytes) -> OutputAttack:
    """The GAN's generator as an attack."""
    model = OnnxModel(graph, name=GENERATOR_FILE)

    def lie(probabilities: Float32Array, rng: np.random.Generator) -> Float32Array:
        noise = rng.standard_normal(probabilities.shape, dtype=np.float32)
        return run_graph(model, "attacked", service=probabilities, noise=noise)

    return OutputAttack(GENERATOR, "the learned liar, trained against the detector", lie)


def attack_all(rows: Predictions, attacks: Sequence[OutputAttack], seed: int) -> list[AttackedRows]:
    """Every output attack on every row; rows that an attack leaves unchanged are not part of it."""
    made = []
    for attack in attacks:
        service, changed = attack.apply(rows.service, attack.stream(seed))
        index = np.flatnonzero(changed)
        if len(index):
            verification = np.ascontiguousarray(rows.verification[index])
            made.append(AttackedRows(attack.name, attack.summary, service[index], verification, index))
    return made


@dataclass(frozen=True)
class Measured:
    """One attack's numbers: JSON values, JSON comparison, and what the report draws."""

    values: dict[str, Any]
    comparison: dict[str, Any]
    details: Details


def measure(judge: LearnedDetection, clean: Predictions, attack: AttackedRows, weights: Any, rate: float) -> Measured:
    """All measures of one attack."""
    benign_score = judge.score(clean.service, clean.verification)
    attacked_score = judge.score(attack.service, attack.verification)
    scores = Scores(benign_score, attacked_score, attack.rows, weights)
    false_alarms, true_alarms = scores.above(0.5)
    attacked_p = judge.calibration.p_value(attacked_score)
    m = len(attack.rows)
    estimates = {
        "accuracy": Estimate.of(0.5 * (1.0 - false_alarms + true_alarms), m),
        # Half as many independent trials: AUROC compares two rows, and F1 moves twice as fast as its true alarms.
        "f1": Estimate.of(2.0 * true_alarms / (1.0 + true_alarms + false_alarms), m / 2),
        "auroc": Estimate.of(scores.auroc(), m / 2),
        **{f"tpr_at_fpr_{level:g}": Estimate.of(scores.tpr_at(level), m) for level in FPR_LEVELS},
        "detected": Estimate.share(attacked_p <= rate),
    }
    inputs = {"service": attack.service, "verification": attack.verification}
    answer = run_graph(judge.reclassifier, "probabilities", **inputs).argmax(axis=1)
    estimates["recovered_service"] = Estimate.share(answer == clean.service.argmax(axis=1)[attack.rows])
    if clean.labels is not None:
        truth = clean.labels[attack.rows]
        outputs = [o.name for o in judge.reclassifier.outputs]
        guess = run_graph(judge.reclassifier, "truth", **inputs).argmax(axis=1) if "truth" in outputs else answer
        estimates["recovered_truth"] = Estimate.share(guess == truth)
        estimates["recovered_truth_by_service"] = Estimate.share(answer == truth)
    values: dict[str, Any] = {"rows": m}
    for name, estimate in estimates.items():
        values.update(estimate.to_json(name))
    if clean.labels is None:
        values.update({"recovered_truth": None, "recovered_truth_interval": [None, None]})
    copy = clean.service[attack.rows]
    values["escalation"] = escalate_attack(attacked_p, attack.service, copy, answer, rate)
    rules = rule_scores(clean, attack, weights)
    return Measured(
        values,
        compare(scores, rules["disagreement"], rules["kl"]),
        Details(
            {"learned": scores.roc(), **{name: rule.roc() for name, rule in rules.items()}},
            benign_score,
            attacked_score,
            attack.rows,
            attack.service.argmax(axis=1),
            attack.verification.argmax(axis=1),
            answer,
        ),
    )


def agreement_measures(rows: Predictions) -> dict[str, Any]:
    """How often the clean models agree, and are right where there are labels."""
    service, verification = rows.service.argmax(axis=1), rows.verification.argmax(axis=1)
    measures = Estimate.share(service == verification).to_json("agreement")
    if rows.labels is not None:
        measures.update(Estimate.share(service == rows.labels).to_json("service_accuracy"))
        measures.update(Estimate.share(verification == rows.labels).to_json("verification_accuracy"))
    return measures


def _verification_cost(provenance: dict[str, Any]) -> float | None:
    """The verification model's multiply-adds as a share of the service's, where both are known."""
    service, own = ((provenance.get(model) or {}).get("cost") or {} for model in ("service", "verification"))
    return own["macs"] / service["macs"] if own.get("macs") and service.get("macs") else None


def _unseen(
    result: dict[str, Any],
    training: Predictions,
    judged: Predictions,
    outputs: Sequence[OutputAttack],
    registry: AttackRegistry,
    rate: float,
    seed: int,
    tell: Progress,
) -> None:
    """Train again without each attack and measure it then."""
    weights = bootstrap_weights(judged.n_rows, seed)
    attacked = attack_all(judged, outputs, seed)
    # Attacks of plug-ins are judged too, though the bundle may never have trained on them.
    trained_on = [*DEFAULT_OUTPUT_ATTACKS, GENERATOR]
    for i, attack in enumerate(attacked):
        tell(f"training without {attack.name}", i / len(attacked))
        names = [name for name in trained_on if name != attack.name]
        artifacts = train_on(training, attacks=names, registry=registry, false_alarm_rate=rate, seed=seed)
        measured = measure(LearnedDetection.of_artifacts(artifacts), judged, attack, weights, rate)
        result["unseen"][attack.name] = measured.values
        result["comparison"]["unseen"][attack.name] = measured.comparison
