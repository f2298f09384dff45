from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fides_plugins import Detection, InputError, Prediction, Query, Reclassification, Verification, hookimpl
from fides_plugins.pipeline import Pipeline
from fides_plugins.policy import failed_verdict
from fides_plugins.settings import Settings
from fides_plugins.testing import INPUT_NAME, fake_logits, fake_query, fake_service, make_bundle, switch_top_two


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pipeline") / "bundle"
    make_bundle(path)
    return path


def make(folder: Path, *plugins: Any, **settings: Any) -> Pipeline:
    values = {"bundle": str(folder), "mode": "flag", **settings}
    return Pipeline.from_settings(Settings.from_mapping(values), extra={f"p{i}": p for i, p in enumerate(plugins)})


def raising(hook: str) -> Any:
    def fail(self: Any) -> None:
        raise RuntimeError("secret in /etc/passwd")

    return type("Raising", (), {hook: hookimpl(fail)})()


LOGITS = fake_logits(8, 10)
QUERY = fake_query(LOGITS)
HONEST = fake_service(LOGITS)
LIE = Prediction.from_output(switch_top_two(HONEST.probabilities, [1, 2]), "probabilities")


def test_honest_rows_are_trusted_and_unchanged(folder: Path):
    verdict = make(folder).run(QUERY, HONEST)
    assert verdict.counts() == {"trusted": 8, "attacked": 0, "indeterminate": 0, "error": 0}
    np.testing.assert_array_equal(verdict.probabilities, HONEST.probabilities)
    assert set(verdict.reason) == {""}


def test_attacked_rows_are_named_and_corrected(folder: Path):
    verdict = make(folder).run(QUERY, LIE)
    assert verdict.status_text.tolist() == ["trusted", "attacked", "attacked"] + ["trusted"] * 5
    np.testing.assert_array_equal(verdict.label, HONEST.label)
    np.testing.assert_array_equal(verdict.service_label, LIE.label)
    assert verdict.corrected.tolist() == [False, True, True] + [False] * 5
    assert "suspicious at a false-alarm rate of 0.01 (learned)" in verdict.reason[1]


def test_an_empty_batch_is_no_error(folder: Path):
    empty = fake_query(LOGITS[:0])
    verdict = make(folder).run(empty, Prediction.from_output(LOGITS[:0], "logits"))
    assert verdict.n_rows == 0
    assert sum(verdict.counts().values()) == 0


@pytest.mark.parametrize("hook", ["fides_verify", "fides_detect"])
def test_a_plugin_that_raises_makes_trusted_rows_errors(folder: Path, hook: str):
    pipeline = make(folder, raising(hook))
    verdict = pipeline.run(QUERY, LIE)
    # The built-in detector still finds the two lies; nothing else may pass as trusted.
    assert verdict.counts() == {"trusted": 0, "attacked": 2, "indeterminate": 0, "error": 6}
    assert all("plug-in 'p0' raised RuntimeError" in r for r in verdict.reason)
    assert not any("passwd" in r for r in verdict.reason)
    assert pipeline.plugin_errors == {"p0": 1}


def test_a_reclassifier_that_raises_leaves_the_next_to_answer(folder: Path):
    pipeline = make(folder, raising("fides_reclassify"))
    verdict = pipeline.run(QUERY, LIE)
    np.testing.assert_array_equal(verdict.label, HONEST.label)
    assert pipeline.plugin_errors == {"p0": 1}


def test_without_any_reclassifier_there_is_no_label_to_use(folder: Path):
    pipeline = make(folder, raising("fides_reclassify"), plugins={"blocked": ["reclassifier"]})
    verdict = pipeline.run(QUERY, LIE)
    assert verdict.label[[1, 2]].tolist() == [-1, -1]
    assert not verdict.probabilities[1].any()
    assert not verdict.corrected.any()


def test_a_recorder_that_raises_changes_nothing_but_the_count(folder: Path):
    pipeline = make(folder, raising("fides_record"))
    assert pipeline.run(QUERY, HONEST).counts()["trusted"] == 8
    assert pipeline.plugin_errors == {"p0": 1}


def test_a_plugin_of_the_users_comes_before_the_built_in(folder: Path):
    class Always:
        @hookimpl
        def fides_reclassify(self, service: Prediction) -> Reclassification:
            return Reclassification(np.eye(10)[np.full(service.n_rows, 9)], "always")

    assert make(folder, Always()).run(QUERY, LIE).label[[1, 2]].tolist() == [9, 9]


@pytest.mark.parametrize(
    "answer",
    [
        "a string",
        Detection(np.zeros(3), np.zeros(3, bool), "short"),
        np.zeros(8),
    ],
)
def test_a_detector_that_breaks_the_contract_is_an_error(folder: Path, answer: Any):
    class Wrong:
        @hookimpl
        def fides_detect(self) -> Any:
            return answer

    verdict = make(folder, Wrong()).run(QUERY, HONEST)
    assert verdict.counts()["error"] == 8
    assert "broke the contract" in verdict.reason[0]


class Unscored:
    """A detector that finds nothing, and has no number for some rows though it does not say so."""

    def __init__(self, rows: list[int], value: float = np.nan, silent: tuple[int, ...] = ()) -> None:
        self.rows, self.value, self.silent = rows, value, silent

    @hookimpl
    def fides_detect(self, service: Prediction) -> Detection:
        score, valid = np.zeros(service.n_rows), np.ones(service.n_rows, bool)
        score[self.rows] = self.value
        valid[list(self.silent)] = False
        return Detection(score, score > 0, "unscored", valid=valid)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_score_that_is_no_number_fails_its_rows_and_no_other(folder: Path, value: float):
    pipeline = make(folder, Unscored([2, 5], value), breaker_failures=1)
    for calls in (1, 2):  # a row of one client does not open the circuit for the others
        verdict = pipeline.run(QUERY, LIE)
        expected = ["trusted", "attacked", "attacked", "trusted", "trusted", "error", "trusted", "trusted"]
        assert verdict.status_text.tolist() == expected
        failed = "plug-in 'p0' broke the contract: it gave a score that is not a finite number in fides_detect"
        assert verdict.reason[5] == failed
        assert verdict.reason[2].endswith(f"(learned); {failed}")
        assert failed not in verdict.reason[1]
        assert pipeline.plugin_errors == {"p0": calls}


def test_a_detector_without_any_score_has_failed_as_one_that_raises(folder: Path):
    pipeline = make(folder, Unscored(list(range(8))), breaker_failures=2)
    raised = make(folder, raising("fides_detect"), breaker_failures=2)
    for calls in (1, 2, 3):
        verdict, other = pipeline.run(QUERY, LIE), raised.run(QUERY, LIE)
        assert verdict.counts() == other.counts() == {"trusted": 0, "attacked": 2, "indeterminate": 0, "error": 6}
        assert pipeline.plugin_errors == raised.plugin_errors == {"p0": calls}
    assert "left alone" in verdict.reason[0]
    alone = make(folder, Unscored(list(range(8))), plugins={"blocked": ["detector"]}).run(QUERY, HONEST)
    assert alone.counts()["error"] == 8


def test_no_opinion_is_no_failure_whatever_the_score(folder: Path):
    pipeline = make(folder, Unscored([2, 5], silent=(2, 5)))
    assert pipeline.run(QUERY, HONEST).counts()["trusted"] == 8
    assert not pipeline.plugin_errors
    # The built-in detector's own rows without a reference stay what they were.
    inputs = LOGITS.copy()
    inputs[5] = np.nan
    assert pipeline.run(fake_query(inputs), HONEST).status_text[5] == "indeterminate"
    assert not pipeline.plugin_errors


def test_an_alarm_is_not_put_down_to_a_detector_that_found_nothing(folder: Path):
    class Calm:
        @hookimpl
        def fides_detect(self, service: Prediction) -> Detection:
            zero = np.zeros(service.n_rows)
            return Detection(zero, zero > 0, "calm", p_value=zero + 1)

    verdict = make(folder, Calm(), false_alarm_rate=0.02).run(QUERY, LIE)
    assert verdict.reason[1] == "suspicious at a false-alarm rate of 0.02 (learned)"


def test_a_verifier_with_another_class_count_is_an_error(folder: Path):
    class Narrow:
        @hookimpl
        def fides_verify(self, query: Query) -> Verification:
            return Verification.single(np.full((query.n_rows, 3), 1 / 3), "narrow")

    verdict = make(folder, Narrow()).run(QUERY, HONEST)
    assert verdict.counts()["error"] == 8
    assert "class counts differ" in verdict.reason[0]


def test_no_answer_is_indeterminate(folder: Path):
    verdict = make(folder, plugins={"blocked": ["verifier"]}).run(QUERY, HONEST)
    assert verdict.counts()["indeterminate"] == 8
    verdict = make(folder, plugins={"blocked": ["detector"]}).run(QUERY, HONEST)
    assert verdict.counts()["indeterminate"] == 8


def test_a_plugin_that_hangs_costs_the_timeout_once_and_then_nothing(folder: Path):
    release = threading.Event()

    class Hangs:
        @hookimpl
        def fides_verify(self) -> None:
            release.wait(20)

    pipeline = make(folder, Hangs(), timeout_ms=500, breaker_failures=2)
    try:
        for _ in range(2):
            verdict = pipeline.run(QUERY, HONEST)
            assert verdict.counts()["error"] == 8
            assert "gave no answer in time" in verdict.reason[0]
        start = time.perf_counter()
        verdict = pipeline.run(QUERY, HONEST)
        assert time.perf_counter() - start < 0.4
        assert "left alone" in verdict.reason[0]
    finally:
        release.set()


def test_rows_that_are_not_finite_are_errors_alone(folder: Path):
    logits = LOGITS.copy()
    logits[3, 0] = np.nan
    logits[4, 1] = np.inf
    verdict = make(folder).run(QUERY, Prediction.from_output(logits, "logits"))
    assert verdict.status_text.tolist() == ["trusted"] * 3 + ["error"] * 2 + ["trusted"] * 3
    assert verdict.label[[3, 4]].tolist() == [-1, -1]
    inputs = LOGITS.copy()
    inputs[5] = np.nan
    verdict = make(folder).run(fake_query(inputs), HONEST)
    assert verdict.status_text[5] == "indeterminate"
    assert verdict.counts()["trusted"] == 7


@pytest.mark.parametrize(
    ("inputs", "text"),
    [
        (np.zeros((8, 7), np.float32), "shape 8x7; expected Nx10"),
        (np.zeros((8, 10), np.float64), "dtype float64; expected float32"),
        (np.zeros((8, 10, 1), np.float32), "shape 8x10x1"),
    ],
)
def test_input_that_the_verification_model_cannot_take_is_named(folder: Path, inputs: np.ndarray, text: str):
    pipeline = make(folder, breaker_failures=1)
    verdict = pipeline.run(Query({INPUT_NAME: inputs}), HONEST)
    assert verdict.counts()["error"] == 8
    assert text in verdict.reason[0]
    # Somebody's bad input must not open the circuit for everybody else.
    assert pipeline.run(QUERY, HONEST).counts()["trusted"] == 8


def test_a_service_with_another_class_count_is_an_error(folder: Path):
    verdict = make(folder).run(QUERY, Prediction.from_output(np.zeros((8, 4)), "logits"))
    assert verdict.counts()["error"] == 8
    assert verdict.reason[0] == "the service answered with 4 classes, the bundle has 10"
    verdict = make(folder).run(QUERY, Prediction.from_output(np.zeros((5, 10)), "logits"))
    assert "5 rows for 8 inputs" in verdict.reason[0]


def test_cutting_after_verify_changes_nothing(folder: Path):
    pipeline = make(folder)
    whole, cut = pipeline.run(QUERY, LIE), pipeline.validate(QUERY, LIE, pipeline.verify(QUERY))
    for name in ("status", "score", "p_value", "label", "probabilities"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(cut, name))


def test_two_detectors_share_the_budget(folder: Path):
    verdict = make(folder, detector="both", divergence="kl").run(QUERY, LIE)
    assert verdict.counts()["attacked"] == 2
    assert "(kl, learned)" in verdict.reason[1]


def test_recorders_see_every_verdict(folder: Path):
    seen: list[dict[str, int]] = []

    class Recorder:
        @hookimpl
        def fides_record(self, verdict: Any) -> None:
            seen.append(verdict.counts())

    pipeline = make(folder, Recorder())
    pipeline.run(QUERY, LIE)
    pipeline.record(QUERY, failed_verdict(pipeline.settings, 8, 10, "no bundle"))
    assert [s["attacked"] for s in seen] == [2, 0]
    assert seen[1]["error"] == 8


def test_stages_are_timed(folder: Path):
    pipeline = make(folder)
    stages: list[str] = []
    pipeline.on_stage = lambda stage, seconds: stages.append(stage)
    pipeline.run(QUERY, LIE)
    assert stages == ["verify", "detect", "reclassify"]


def test_parallel_requests_do_not_mix(folder: Path):
    pipeline = make(folder)
    wrong: list[str] = []

    def client(seed: int) -> None:
        logits = fake_logits(4, 10, seed)
        service = fake_service(logits, seed, noise=0.01)
        lie = Prediction.from_output(switch_top_two(service.probabilities, [seed % 4]), "probabilities")
        for _ in range(20):
            verdict = pipeline.run(fake_query(logits), lie)
            if (
                np.flatnonzero(verdict.status == 1).tolist() != [seed % 4]
                or verdict.label.tolist() != service.label.tolist()
            ):
                wrong.append(str(verdict.status_text))

    threads = [threading.Thread(target=client, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_pipeline_needs_a_bundle_and_a_supported_budget(folder: Path):
    with pytest.raises(Exception, match="No bundle is set"):
        Pipeline.from_settings(Settings())
    with pytest.raises(Exception, match="needs at least 99999 calibration rows"):
        make(folder, false_alarm_rate=1e-5)


def test_plugins_cannot_change_what_others_see(folder: Path):
    class Vandal:
        @hookimpl
        def fides_detect(self, query: Query, service: Prediction) -> None:
            service.probabilities[:] = 0.1

    verdict = make(folder, Vandal()).run(QUERY, HONEST)
    assert verdict.counts()["error"] == 8
    np.testing.assert_array_equal(verdict.probabilities, HONEST.probabilities)


def test_an_input_error_is_safe_to_show():
    assert "Reshape" in str(InputError("bad shape.", "Reshape it."))
