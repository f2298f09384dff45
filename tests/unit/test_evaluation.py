"""Measures against plain definitions, the evaluation's JSON, and the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from fides_plugins.bundle import Bundle
from fides_plugins.cli import app
from fides_plugins.errors import TrainingError
from fides_plugins.training.attacks import default_registry
from fides_plugins.training.detection import fit_predictions
from fides_plugins.training.evaluation import MEASURES, Evaluation, evaluate
from fides_plugins.training.predictions import Predictions
from fides_plugins.training.statistics import Estimate, Scores, bootstrap_weights, mean
from fides_plugins.training.synthetic import synthetic_pair

K = 5
NAMES = ("switch", "random", "average", "targeted", "confidence", "generator")


def save(path: Path, rows: Predictions) -> Path:
    arrays: dict[str, Any] = {"service_probabilities": rows.service, "verification_probabilities": rows.verification}
    if rows.labels is not None:
        arrays["labels"] = rows.labels
    np.savez(path, **arrays)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle fitted on predictions, and rows to evaluate it on."""
    root = tmp_path_factory.mktemp("evaluation")
    fit = save(root / "fit.npz", synthetic_pair(1200, K, signal=3.0))
    save(root / "test.npz", synthetic_pair(800, K, signal=3.0, seed=1))
    fit_predictions(fit, root / "bundle", attacks=("switch", "random", "generator"))
    return root


@pytest.fixture(scope="module")
def found(folder: Path) -> Evaluation:
    return evaluate(
        Bundle.load(folder / "bundle"),
        synthetic_pair(800, K, signal=3.0, seed=1),
        registry=default_registry(),
        unseen=False,
    )


def test_the_json_has_the_promised_keys_each_with_its_interval(found: Evaluation):
    result = json.loads(json.dumps(found.result, allow_nan=False))
    assert set(result["attacks"]) == set(NAMES)
    tables = [(result["clean"], ("false_alarm_rate",)), *((v, MEASURES) for v in result["attacks"].values())]
    for table, names in tables:
        for name in names:
            low, high = table[f"{name}_interval"]
            assert 0 <= low <= table[name] <= high <= 1, name
    for fraction in ("1.0", "0.5", "0.2", "0.1"):
        assert {"median", "p95", "median_interval", "p95_interval"} <= set(result["monitor"][fraction])
    assert result["monitor"]["false_alarms"] == 0
    assert result["unseen"] == {}


def test_figures_follow_their_definitions(found: Evaluation, folder: Path):
    bundle, rows = Bundle.load(folder / "bundle"), synthetic_pair(800, K, signal=3.0, seed=1)
    details, values = found.details["switch"], found.result["attacks"]["switch"]
    tpr, fpr = (details.attacked > 0.5).mean(), (details.benign > 0.5).mean()
    assert values["accuracy"] == pytest.approx((tpr + 1 - fpr) / 2, abs=1e-6)
    assert values["f1"] == pytest.approx(2 * tpr / (2 * tpr + fpr + 1 - tpr), abs=1e-6)
    wins = (details.attacked[:, None] > details.benign).mean() + 0.5 * (
        details.attacked[:, None] == details.benign
    ).mean()
    assert values["auroc"] == pytest.approx(wins, abs=1e-6)
    calibration = bundle.calibrations()["learned"]
    assert values["detected"] == pytest.approx((calibration.p_value(details.attacked) <= 0.01).mean(), abs=1e-6)
    own = rows.service.argmax(axis=1)[details.rows]
    assert values["recovered_service"] == pytest.approx((details.corrected == own).mean(), abs=1e-6)
    for level in (0.01, 0.05):
        best = max(
            (details.attacked > t).mean() for t in details.benign if (details.benign > t).mean() <= level + 1e-12
        )
        assert values[f"tpr_at_fpr_{level:g}"] == pytest.approx(best, abs=1e-6)


def test_detection_beats_chance_and_stands_beside_the_rules(found: Evaluation):
    for name in ("switch", "random", "average"):
        assert found.result["attacks"][name]["auroc"] > 0.9
        assert set(found.result["comparison"]["seen"][name]) == {"disagreement", "kl_at_fpr_0.01", "kl_at_fpr_0.05"}
    table = found.result["comparison"]["seen"]["switch"]["disagreement"]
    assert table["difference"] == pytest.approx(table["learned"] - table["rule"], abs=2e-6)


def test_bootstrap_intervals_agree_with_theory():
    rng = np.random.default_rng(0)
    hits = rng.random(2000) < 0.3
    estimate = Estimate.of(mean(hits, bootstrap_weights(2000, seed=1)))
    assert estimate.value == pytest.approx(hits.mean(), abs=1e-6)
    half = 1.96 * np.sqrt(0.3 * 0.7 / 2000)
    assert estimate.high - estimate.low == pytest.approx(2 * half, rel=0.25)
    weights = bootstrap_weights(50, seed=2)
    assert (weights[0] == 1).all()
    np.testing.assert_array_equal(weights.sum(axis=1), 50)


def test_ties_are_no_alarms_and_count_one_half_in_the_area():
    weights = bootstrap_weights(4)
    scores = Scores([0.1, 0.5, 0.5, 0.5], [0.5, 0.5, 0.9, 0.9], np.arange(4), weights)
    assert scores.tpr_at(0.0)[0] == 0.5
    assert scores.tpr_at(0.5)[0] == 0.5
    assert scores.auroc()[0] == pytest.approx((2 * 1 + 2 * (0.25 + 0.75 / 2)) / 4)


def test_nothing_but_nan_gives_no_estimate():
    assert Estimate.of(np.full(10, np.nan)).to_json("x") == {"x": None, "x_interval": [None, None]}


def test_other_class_counts_and_small_budgets_are_refused(folder: Path):
    bundle = Bundle.load(folder / "bundle")
    with pytest.raises(TrainingError, match="have 4 classes, the bundle 5"):
        evaluate(bundle, synthetic_pair(50, 4), registry=default_registry())
    with pytest.raises(Exception, match="needs at least 9999 calibration rows"):
        evaluate(bundle, synthetic_pair(50, K), registry=default_registry(), false_alarm_rate=1e-4)


def test_the_command_prints_json_and_writes_the_report(folder: Path):
    page = folder / "out.html"
    run = CliRunner().invoke(
        app,
        [
            *("evaluate", str(folder / "bundle"), "--predictions", str(folder / "test.npz")),
            *("--no-unseen", "--json", "--report", str(page)),
        ],
    )
    assert run.exit_code == 0, run.output
    assert set(json.loads(run.stdout)["attacks"]) == set(NAMES)
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")


def test_the_command_prints_a_table_for_people(folder: Path):
    arguments = ["evaluate", str(folder / "bundle"), "--predictions", str(folder / "test.npz"), "--no-unseen"]
    run = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert run.exit_code == 0, run.output
    assert "False alarms" in run.output
    assert "switch" in run.output


@pytest.mark.parametrize("arguments", [[], ["--service", "x.onnx"], ["--predictions", "a.npz", "--data", "b.npz"]])
def test_the_command_needs_one_source(arguments: list[str], folder: Path):
    run = CliRunner().invoke(app, ["evaluate", str(folder / "bundle"), *arguments])
    assert "Give --predictions, or --service and --data" in str(run.exception)


def test_attacks_left_out_of_training_are_trained_without(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """The real training, with every call recorded."""
    from fides_plugins.training import evaluation

    asked: list[tuple[str, ...]] = []
    real = evaluation.train_on

    def recorded(rows: Predictions, **options: Any) -> Any:
        asked.append(tuple(options["attacks"]))
        return real(rows, **{**options, "attacks": ("random",)}) if len(asked) == 1 else first[0]

    first: list[Any] = []

    def once(rows: Predictions, **options: Any) -> Any:
        made = recorded(rows, **options)
        first[:] = [made]
        return made

    monkeypatch.setattr(evaluation, "train_on", once)
    rows = synthetic_pair(400, K, signal=3.0, seed=2)
    fit = synthetic_pair(600, K, signal=3.0, seed=3)
    result = evaluate(Bundle.load(folder / "bundle"), rows, registry=default_registry(), fit_rows=fit).result
    assert set(result["unseen"]) == set(NAMES) == set(result["comparison"]["unseen"])
    for name, names in zip(result["unseen"], asked, strict=True):
        assert name not in names
        assert set(names) == set(NAMES) - {name}
