"""Measures against plain definitions, the evaluation's JSON, and the command."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from fides_plugins.bundle import Bundle
from fides_plugins.cli import app
from fides_plugins.errors import InputError, TrainingError
from fides_plugins.statistics.intervals import wilson
from fides_plugins.training.attacks import default_registry
from fides_plugins.training.detector.detection import fit_predictions
from fides_plugins.training.evaluation.escalation import escalate_attack, escalate_clean
from fides_plugins.training.evaluation.evaluate import MEASURES, Evaluation, evaluate
from fides_plugins.training.evaluation.measures import Estimate, Scores, bootstrap_weights, mean
from fides_plugins.training.evaluation.monitor_study import MonitorStudy, study_monitor
from fides_plugins.training.evaluation.report import render
from fides_plugins.training.evaluation.synthetic import synthetic_pair
from fides_plugins.training.predictions import Predictions
from tests.support.docs_blocks import REPOSITORY

PAGE = REPOSITORY / "docs" / "reference" / "evaluation.md"
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
        names = {"median", "p95", "alarmed"}
        assert {*names, *(f"{n}_interval" for n in names)} == set(result["monitor"][fraction])
    assert result["monitor"]["false_alarms"] == 0
    assert result["notes"] == []
    assert result["unseen"] == {}


def test_a_second_look_catches_more_for_what_it_costs_and_accuses_nobody(found: Evaluation):
    clean = found.result["clean"]["escalation"]
    assert list(clean) == ["0.05", "0.1", "0.15", "0.2", "0.25", "0.3"]
    costs = [entry["cost"] for entry in clean.values()]
    assert costs == sorted(costs)
    for share, entry in clean.items():
        assert abs(entry["cost"] - float(share)) < 0.05, share
        assert entry["false_alarm_rate"] == 0.0 < entry["false_alarm_rate_interval"][1] < 0.01, share
    for name, values in found.result["attacks"].items():
        caught = [entry["detected"] for entry in values["escalation"].values()]
        assert caught == sorted(caught), name
        assert caught[-1] >= values["detected"], name
        for entry in values["escalation"].values():
            assert entry["recovered_service"] >= values["recovered_service"], name


def test_a_second_look_decides_where_it_was_asked_and_the_first_where_not():
    copy = np.array([[0.7, 0.3], [0.6, 0.4], [0.2, 0.8], [0.9, 0.1]], np.float32)
    lies = copy[:, ::-1].copy()
    lies[3] = copy[3]  # no lie: what is equal to the copy is trusted, however doubtful it was
    p_values = np.array([0.001, 0.07, 0.9, 0.001])
    table = escalate_attack(p_values, lies, copy, np.zeros(4, np.int64), rate=0.01)
    assert table["0.05"]["detected"] == 0.25
    assert table["0.1"]["detected"] == 0.5
    assert table["0.05"]["recovered_service"] == 0.75  # rows 0 and 3 by the copy, row 1 by the re-classifier
    # A budget above the share: what was not asked again keeps the first verdict.
    assert escalate_attack(p_values, lies, copy, np.zeros(4, np.int64), rate=0.2)["0.05"]["detected"] == 0.5
    clean = escalate_clean(p_values, copy, 0.2, verification=0.1)
    assert clean["0.05"]["cost"] == 0.6
    assert clean["0.05"]["false_alarm_rate"] == 0.25  # row 1 was not asked again


def paths(value: Any, path: tuple[str, ...] = ()) -> set[str]:
    """Every key, as the reference page writes it: names of attacks, rules and shares are placeholders there."""
    if not isinstance(value, dict):
        return {".".join(path)}
    found: set[str] = set()
    for key, inner in value.items():
        section, name = path[:1], key
        if (section, len(path)) in {(("attacks",), 1), (("skipped",), 1), (("comparison",), 2)}:
            name = "<attack>"
        elif section == ("comparison",) and len(path) == 3:
            name = "<rule>"
        elif path[-1:] == ("escalation",) or (section == ("monitor",) and isinstance(inner, dict)):
            name = "<share>"
        found |= paths(inner, (*path, name))
    return found


def test_the_reference_page_has_the_keys_of_a_run(found: Evaluation):
    lines = re.findall(r"^\| `([^`]+)` \| ([^|]+) \|([^|]*)\| ([^|]+) \|$", PAGE.read_text(), re.MULTILINE)
    documented = set()
    for key, unit, interval, meaning in lines:
        assert unit.strip(), key
        assert meaning.strip(), key
        documented |= {key, f"{key}_interval"} if interval.strip() else {key}
    run = {**found.result, "skipped": {"x": "why"}, "unseen": {}}
    run["comparison"] = {"seen": run["comparison"]["seen"]}
    assert documented == paths({k: v for k, v in run.items() if k != "unseen"})


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


def test_a_share_of_rows_has_the_interval_of_the_tables():
    # Brown, Cai, DasGupta (2001), and worked out by hand at the ends: z^2 / (n + z^2).
    assert wilson(15, 50) == pytest.approx((0.1910, 0.4375), abs=1e-4)
    assert wilson(0, 200) == pytest.approx((0.0, 3.8415 / 203.8415), abs=1e-5)
    assert wilson(20, 20) == pytest.approx((20 / 23.8415, 1.0), abs=1e-5)
    assert Estimate.share([True] * 3 + [False]).to_json("x")["x"] == 0.75
    rng = np.random.default_rng(0)
    for rate in (0.002, 0.01, 0.3):
        hits = rng.binomial(200, rate, size=2000)
        held = [low <= rate <= high for low, high in (wilson(h, 200) for h in hits)]
        assert np.mean(held) > 0.9, rate


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_what_no_draw_differs_in_is_not_certain(value: float):
    estimate = Estimate.of(np.full(401, value), 60)
    unseen = wilson(0, 60)[1]
    assert (estimate.low, estimate.high) == pytest.approx((max(0, value - unseen), min(1, value + unseen)))
    difference = Estimate.of(np.zeros(401), 60, bounds=(-1.0, 1.0))
    assert (difference.low, difference.high) == pytest.approx((-unseen, unseen))
    few = np.array([1.0] * 400 + [0.9])  # percentiles of the draws alone: 1 to 1
    assert Estimate.of(few, 60).low == pytest.approx(1 - unseen)


def test_a_rate_needs_rows_of_which_one_may_be_above_it():
    weights = bootstrap_weights(99)
    scores = Scores(np.linspace(0, 0.5, 99), np.ones(99), np.arange(99), weights)
    assert np.isnan(scores.tpr_at(0.01)).all()
    np.testing.assert_array_equal(scores.tpr_at(0.05), 1.0)
    assert scores.tpr_at(0.0)[0] == 1.0
    weights = bootstrap_weights(100)
    np.testing.assert_array_equal(
        Scores(np.linspace(0, 0.5, 100), np.ones(100), np.arange(100), weights).tpr_at(0.01), 1.0
    )


def test_sixty_rows_give_no_figure_at_one_percent(folder: Path):
    bundle, rows = Bundle.load(folder / "bundle"), synthetic_pair(60, K, signal=3.0, seed=1)
    found = evaluate(bundle, rows, registry=default_registry(), unseen=False)
    result = json.loads(json.dumps(found.result, allow_nan=False))
    assert result["notes"] == ["tpr_at_fpr_0.01 of `attacks` needs at least 100 benign rows; it is judged on 60."]
    low, high = result["clean"]["false_alarm_rate_interval"]
    assert high - low > 0.05
    for name, values in result["attacks"].items():
        assert values["tpr_at_fpr_0.01"] is None
        assert values["tpr_at_fpr_0.01_interval"] == [None, None]
        for measure in {*MEASURES} - {"tpr_at_fpr_0.01"}:
            low, high = values[f"{measure}_interval"]
            assert low < high, (name, measure)
    for rules in result["comparison"]["seen"].values():
        cell = rules["kl_at_fpr_0.01"]
        assert [cell[k] for k in ("learned", "rule", "difference", "no_worse")] == [None] * 4
        assert isinstance(rules["kl_at_fpr_0.05"]["no_worse"], bool)
    page = render(bundle, rows, found)
    assert result["notes"][0] in page
    assert "<td>n/a</td>" in page


def test_a_benign_sequence_without_alarm_does_not_prove_that_there_is_none():
    p_values = np.random.default_rng(0).random(2000)
    result = study_monitor(p_values, p_values / 100, 200, MonitorStudy(sequences=20, length=60, clean_length=50))
    assert result["false_alarms"] == 0
    assert result["false_alarms_interval"] == pytest.approx([0.0, 200 * wilson(0, 200)[1]], abs=1e-6)
    assert result["1.0"]["alarmed"] == 1.0
    assert result["1.0"]["alarmed_interval"] == pytest.approx(wilson(20, 20), abs=1e-6)


def test_sequences_without_alarm_are_part_of_the_interval():
    p_values = np.random.default_rng(0).random(2000)
    study = MonitorStudy(sequences=40, length=40, clean_sequences=2, clean_length=5, fractions=(0.5,))
    values = study_monitor(p_values, p_values / 30, 200, study)["0.5"]
    assert 0.5 < values["alarmed"] < 0.95
    assert values["p95"] is None
    assert values["median"] is not None
    assert values["p95_interval"][1] is None


def test_other_class_counts_and_small_budgets_are_refused(folder: Path):
    bundle = Bundle.load(folder / "bundle")
    with pytest.raises(TrainingError, match="have 4 classes, the bundle 5"):
        evaluate(bundle, synthetic_pair(50, 4), registry=default_registry())
    with pytest.raises(Exception, match="needs at least 9999 calibration rows"):
        evaluate(bundle, synthetic_pair(50, K), registry=default_registry(), false_alarm_rate=1e-4)


@pytest.mark.parametrize("n", [1, 19])
def test_rows_too_few_for_any_rate_are_refused_with_the_number_needed(n: int, folder: Path):
    rows = save(folder / f"{n}.npz", synthetic_pair(n, K, seed=1))
    run = CliRunner().invoke(app, ["evaluate", str(folder / "bundle"), "--predictions", str(rows), "--no-unseen"])
    assert isinstance(run.exception, InputError)
    assert f"needs at least 20 benign rows to be measured; `attacks` is judged on {n}." in str(run.exception)


def test_rows_too_few_to_train_again_are_refused_before_anything_is_measured(folder: Path):
    bundle, seen = Bundle.load(folder / "bundle"), []
    with pytest.raises(TrainingError, match=r"99 calibration rows; this split leaves 20\. Give at least 990"):
        evaluate(
            bundle, synthetic_pair(200, K), registry=default_registry(), progress=lambda what, _: seen.append(what)
        )
    assert seen == []


def test_the_command_says_what_the_rows_are_too_few_for(folder: Path):
    rows = save(folder / "60.npz", synthetic_pair(60, K, signal=3.0, seed=1))
    arguments = ["evaluate", str(folder / "bundle"), "--predictions", str(rows), "--no-unseen"]
    run = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert run.exit_code == 0, run.output
    assert "needs at least 100 benign rows; it is judged on 60." in run.output
    assert "n/a" in run.output


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
    from fides_plugins.training.evaluation import evaluate as module

    asked: list[tuple[str, ...]] = []
    real = module.train_on

    def recorded(rows: Predictions, **options: Any) -> Any:
        asked.append(tuple(options["attacks"]))
        return real(rows, **{**options, "attacks": ("random",)}) if len(asked) == 1 else first[0]

    first: list[Any] = []

    def once(rows: Predictions, **options: Any) -> Any:
        made = recorded(rows, **options)
        first[:] = [made]
        return made

    monkeypatch.setattr(module, "train_on", once)
    rows = synthetic_pair(400, K, signal=3.0, seed=2)
    fit = synthetic_pair(600, K, signal=3.0, seed=3)
    result = evaluate(Bundle.load(folder / "bundle"), rows, registry=default_registry(), fit_rows=fit).result
    assert set(result["unseen"]) == set(NAMES) == set(result["comparison"]["unseen"])
    # As docs/reference/evaluation.md says of both.
    assert paths({"attacks": result["unseen"]}) == paths({"attacks": result["attacks"]})
    sides = result["comparison"]
    assert paths({"comparison": {"seen": sides["unseen"]}}) == paths({"comparison": {"seen": sides["seen"]}})
    for name, names in zip(result["unseen"], asked, strict=True):
        assert name not in names
        assert set(names) == set(NAMES) - {name}
