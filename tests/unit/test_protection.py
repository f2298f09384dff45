"""One protection behind every host: reading, merging, blaming, judging, writing back. No server is needed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fides_plugins import Detection, Query, Verdict, Verification, hookimpl
from fides_plugins.errors import BundleError, SettingsError
from fides_plugins.guard import Failure
from fides_plugins.pipeline import VerifyOutcome
from fides_plugins.protection import INTERNAL, Claim, Protection
from fides_plugins.settings import Settings
from fides_plugins.testing import INPUT_NAME, fake_logits, memory_bundle, switch_top_two
from fides_plugins.types import SignedRows, softmax

LOGITS = fake_logits(6)
LIE = np.log(switch_top_two(softmax(LOGITS), [1, 4]))


class Watcher:
    """Counts calls, and fails where a row says so."""

    def __init__(self) -> None:
        self.verified: list[int] = []
        self.detected: list[int] = []
        self.recorded: list[tuple[str, ...]] = []

    @hookimpl
    def fides_verify(self, query: Query) -> Verification | None:
        self.verified.append(query.n_rows)
        if np.isinf(query.tensor(INPUT_NAME)).any():
            raise ValueError("a row of one client")
        return None

    @hookimpl
    def fides_detect(self, service: Any, verification: Verification) -> None:
        self.detected.append(service.n_rows)
        if (service.probabilities[:, 0] > 0.999).any():
            raise ValueError("a row of one client")

    @hookimpl
    def fides_record(self, query: Query, verdict: Verdict) -> None:
        self.recorded.append(query.request_ids)


def protection(watcher: object | None = None, **settings: Any) -> Protection:
    plugins = {} if watcher is None else {"watcher": watcher}
    return Protection.load(Settings.from_mapping(settings), bundle=memory_bundle(), plugins=plugins, concurrent=False)


def query(mine: Protection, rows: NDArray[np.float32], *ids: str) -> Query:
    return mine.query({INPUT_NAME: rows}, len(rows), ids)


def part(mine: Protection, rows: slice, output: NDArray[Any] = LIE, *ids: str) -> Claim:
    """What one client asked and was answered, as the second step of an ensemble sees it."""
    outcome = mine.verify(query(mine, LOGITS[rows]))
    return Claim(mine.query({}, len(LOGITS[rows]), ids), output[rows], outcome)


def test_queries_of_the_same_tensors_are_verified_in_one_call() -> None:
    watcher = Watcher()
    mine = protection(watcher)
    rows = [LOGITS[:1], LOGITS[1:4], LOGITS[4:].astype(np.float64), LOGITS[4:], LOGITS[:0]]
    outcomes = mine.verify_many([query(mine, r) for r in rows])
    assert sorted(watcher.verified) == [2, 6]
    for given, outcome in zip(rows, outcomes, strict=True):
        if given.dtype == np.float32 and len(given):
            assert outcome.verification is not None
            assert np.array_equal(outcome.verification.references[:, 0], softmax(given))
    assert outcomes[2].failures[0].kind == "input"
    assert outcomes[4] == VerifyOutcome(None)


def test_one_clients_row_costs_no_other_its_reference() -> None:
    mine = protection(Watcher())
    bad = np.full((1, 10), np.inf, np.float32)
    good, blamed, other = mine.verify_many([query(mine, r) for r in (LOGITS[:2], bad, LOGITS[2:])])
    assert (good.failures, other.failures) == ((), ())
    assert blamed.failures[0].plugin == "watcher"


def test_a_signed_query_is_spent_once_and_so_asked_alone() -> None:
    watcher = Watcher()
    mine = protection(watcher)
    signed = [mine.query({INPUT_NAME: LOGITS[:2]}, 2, (), [SignedRows(2, "text")]) for _ in range(2)]
    mine.verify_many([*signed, query(mine, LOGITS[:2]), query(mine, LOGITS[:2])])
    assert sorted(watcher.verified) == [2, 2, 4]


def test_parts_that_differ_in_rows_alone_are_judged_in_one_call() -> None:
    watcher = Watcher()
    mine = protection(watcher, mode="flag")
    spans = (slice(0, 1), slice(1, 3), slice(3, 3), slice(3, 6))
    parts = [part(mine, span, LIE, *[f"r{i}" for i in range(span.start, span.stop)]) for span in spans]
    alone = [mine.judge(p.query, p.output, p.outcome, probe=True) for p in parts]
    del watcher.detected[:]
    together = mine.judge_many(parts)
    assert watcher.detected == [6]
    assert watcher.recorded == [tuple(f"r{i}" for i in range(6))]
    for one, other in zip(alone, together, strict=True):
        for name in ("status", "score", "p_value", "label", "probabilities", "corrected", "refused", "reason"):
            assert np.array_equal(getattr(one, name), getattr(other, name), equal_nan=name in ("score", "p_value"))
    assert [v.status_text.tolist() for v in together] == [
        ["trusted"], ["attacked", "trusted"], [], ["trusted", "attacked", "trusted"],
    ]  # fmt: skip


def test_a_plugin_that_fails_on_one_clients_row_fails_for_that_client_alone() -> None:
    watcher = Watcher()
    mine = protection(watcher)
    sure = LOGITS.copy()
    sure[5] = [90, *[0] * 9]
    verdicts = mine.judge_many(
        [part(mine, slice(0, 1), sure), part(mine, slice(2, 4), sure), part(mine, slice(5, 6), sure)]
    )
    assert [v.status_text.tolist() for v in verdicts[:2]] == [["trusted"], ["trusted"] * 2]
    assert "'watcher' raised ValueError" in verdicts[2].reason[0]
    assert len(watcher.recorded) == 3, "each row is recorded once, however often it was judged"


def with_evidence(p: Claim) -> Claim:
    verification = p.outcome.verification
    assert verification is not None
    shown = Verification(verification.references, verification.available, verification.sources, ({"ms": 1},))
    return Claim(p.query, p.output, VerifyOutcome(shown))


def with_failure(p: Claim) -> Claim:
    return Claim(p.query, p.output, VerifyOutcome(p.outcome.verification, (Failure("v", "fides_verify", "timeout"),)))


def with_inputs(p: Claim) -> Claim:
    return Claim(Query({INPUT_NAME: LOGITS[:2]}), p.output, p.outcome)


def with_another_width(p: Claim) -> Claim:
    return Claim(p.query, p.output[:, :4], p.outcome)


@pytest.mark.parametrize("change", [with_evidence, with_failure, with_inputs, with_another_width])
def test_what_belongs_to_one_request_is_judged_alone(change: Any) -> None:
    watcher = Watcher()
    mine = protection(watcher)
    mine.judge_many([change(part(mine, slice(0, 2))), part(mine, slice(0, 2)), part(mine, slice(2, 6))])
    assert len(watcher.recorded) == 2
    assert 6 in watcher.detected


def test_a_probe_is_judged_and_shown_to_nobody() -> None:
    watcher = Watcher()
    mine = protection(watcher)
    p = part(mine, slice(0, 2))
    (verdict,) = mine.judge_many([Claim(p.query, p.output, p.outcome, probe=True)])
    assert verdict.status_text.tolist() == ["trusted", "attacked"]
    assert watcher.recorded == []


OUTPUTS: dict[str, Any] = {
    "text": np.array([["a"] * 10] * 6),
    "objects": np.array([[None] * 10] * 6),
    "one axis": LOGITS[0],
    "a number": np.float32(1),
    "two axes": np.zeros((6, 5, 2)),
    "no class": np.zeros((6, 1)),
    "fewer rows": LOGITS[:3],
    "more classes": np.zeros((6, 11)),
    "not finite": np.full((6, 10), np.nan),
}


@pytest.mark.parametrize("what", OUTPUTS)
def test_nothing_that_a_service_answers_raises_or_is_trusted(what: str) -> None:
    mine = protection()
    asked = query(mine, LOGITS)
    verdict = mine.judge(asked, OUTPUTS[what], mine.verify(asked))
    assert set(verdict.status_text) == {"error"}
    assert verdict.reason[0]


def test_a_failure_of_our_own_is_an_error_without_its_words(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = protection(on_error="closed", mode="flag")
    asked = query(mine, LOGITS)

    def broken(*arguments: Any, **more: Any) -> Any:
        raise MemoryError("/secret/path")

    monkeypatch.setattr("fides_plugins.pipeline.Pipeline.verify", broken)
    outcome = mine.verify(asked)
    assert outcome.failures[0].text == "plug-in 'protection' raised MemoryError in fides_verify"
    assert mine.judge(asked, LOGITS, outcome).status_text.tolist() == ["error"] * 6
    monkeypatch.setattr("fides_plugins.pipeline.Pipeline.validate", broken)
    verdict = mine.judge(asked, LOGITS, outcome)
    assert set(verdict.reason) == {INTERNAL}
    assert verdict.refused.all()


class Sure:
    """A detector whose p-values are zero, which a `Detection` may hold."""

    @hookimpl
    def fides_detect(self, service: Any, verification: Verification) -> Detection:
        n = service.n_rows
        return Detection(np.ones(n), np.ones(n, dtype=bool), "sure", p_value=np.zeros(n))


def test_a_p_value_of_zero_is_an_attack_like_any_other() -> None:
    mine = protection(Sure(), mode="flag")
    asked = query(mine, LOGITS)
    verdict = mine.judge(asked, LOGITS, mine.verify(asked))
    assert verdict.p_value.tolist() == [0.0] * 6
    assert verdict.status_text.tolist() == ["attacked"] * 6


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("shape", [(6, 10), (6, 10, 1, 1), (6, 1, 10)])
def test_a_corrected_output_reads_as_the_correction(temperature: float, shape: tuple[int, ...]) -> None:
    service = {"output_kind": "logits", "temperature": temperature}
    bundle = memory_bundle(service=service)
    mine = Protection.load(Settings(mode="correct"), bundle=bundle, concurrent=False)
    asked, output = query(mine, LOGITS), (temperature * LIE).reshape(shape)
    verdict = mine.judge(asked, output, mine.verify(asked))
    written, after = mine.correct(output, verdict)
    assert after is verdict
    assert np.flatnonzero(verdict.corrected).tolist() == [1, 4]
    assert np.array_equal(written[[0, 2, 3, 5]], output[[0, 2, 3, 5]])
    assert np.allclose(mine.output.read(written).probabilities[[1, 4]], softmax(LOGITS)[[1, 4]], atol=1e-6)


@pytest.mark.parametrize("mode", ["observe", "flag", "reject"])
def test_only_the_mode_correct_changes_an_output(mode: str) -> None:
    mine = protection(mode=mode)
    asked = query(mine, LOGITS)
    verdict = mine.judge(asked, LIE, mine.verify(asked))
    assert verdict.corrected.any()
    output, after = mine.correct(LIE, verdict)
    assert output is LIE
    assert after is verdict


@pytest.mark.parametrize(("on_error", "refused"), [("open", False), ("closed", True)])
def test_a_correction_that_cannot_be_written_leaves_nothing_to_use(on_error: str, refused: bool) -> None:
    mine = protection(mode="correct", on_error=on_error)
    asked = query(mine, LOGITS)
    whole = np.round(LIE).astype(np.int32)
    verdict = mine.judge(asked, LIE, mine.verify(asked))
    output, after = mine.correct(whole, verdict)
    assert output is whole
    assert not after.corrected.any()
    assert after.refused.tolist() == [refused and i in (1, 4) for i in range(6)]
    assert after.label[[1, 4]].tolist() == [-1, -1]
    assert after.reason[1].endswith("; no correction could be written")
    assert after.reason[0] == ""


def test_a_bad_bundle_stops_the_host_or_makes_every_row_an_error(tmp_path: Any) -> None:
    settings = Settings(bundle="nowhere", mode="reject", on_error="closed")
    with pytest.raises(BundleError):
        Protection.load(settings, tmp_path)
    with pytest.raises(SettingsError, match="No bundle"):
        Protection.load(Settings(), tmp_path, on_bad_bundle="error")
    mine = Protection.load(settings, tmp_path, on_bad_bundle="error", concurrent=False)
    asked = query(mine, LOGITS)
    verdicts = [mine.judge(asked, LOGITS, mine.begin(asked)()), mine.unjudged(6, mine.problem)]
    for verdict in verdicts:
        assert set(verdict.status_text) == {"error"}
        assert verdict.refused.all()
        assert "missing" in verdict.reason[0]


def test_who_is_brought_references_runs_no_verifier() -> None:
    mine = Protection.load(Settings(), bundle=memory_bundle(), references="brought", concurrent=False)
    asked = query(mine, LOGITS)
    assert mine.verify(asked) == VerifyOutcome(None)
    brought = VerifyOutcome(Verification.single(softmax(LOGITS), "enclave"))
    assert mine.judge(asked, LIE, brought).status_text.tolist()[:2] == ["trusted", "attacked"]


@pytest.mark.parametrize("concurrent", [True, False])
def test_a_verification_may_run_beside_the_service(concurrent: bool) -> None:
    mine = Protection.load(Settings(), bundle=memory_bundle(), concurrent=concurrent)
    asked = query(mine, LOGITS)
    outcome = mine.begin(asked)()
    assert outcome.verification is not None
    mine.close()


def test_tensors_without_one_entry_per_row_are_no_part_of_a_query() -> None:
    mine = protection()
    made = mine.query({INPUT_NAME: LOGITS, "scale": np.ones(3), "k": np.float32(1)}, 6, ["a", "b"])
    assert set(made.inputs) == {INPUT_NAME}
    assert made.request_ids == ()
    assert mine.query({"scale": np.ones(3)}, 6).n_rows == 6


def test_exempt_rows_pass_whatever_the_settings_say() -> None:
    mine = protection(mode="reject", on_error="closed")
    verdict = mine.unjudged(2, "explanations are not verified", ("a", "b"), exempt=True)
    assert verdict.status_text.tolist() == ["indeterminate"] * 2
    assert not verdict.refused.any()
    assert mine.refuse(query(mine, LOGITS), "the receipt is wrong").refused.all()


def test_a_client_without_an_id_does_not_take_the_others_out_of_the_records() -> None:
    watcher = Watcher()
    mine = protection(watcher)
    mine.judge_many(
        [part(mine, slice(0, 1), LIE, "a"), part(mine, slice(1, 2)), part(mine, slice(2, 4), LIE, "b#0", "b#1")]
    )
    assert sorted(watcher.recorded) == [(), ("a", "b#0", "b#1")]
