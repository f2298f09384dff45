import json

import numpy as np
import pytest
from fides_spotcheck import NAME, Spotcheck, draw, rows_until_caught

from fides_plugins import Prediction, SettingsError
from fides_plugins.testing import OipServer, check_plugin, fake_logits, fake_query, switch_top_two


@pytest.fixture
def trusted():
    with OipServer(lambda inputs: inputs["pixels"]) as server:
        yield server


def settings(server, **options):
    # The built-in detector is left out: the spot check alone must find the lie.
    return {"plugins": {"blocked": ["detector"], "options": {NAME: {"endpoint": server.url, **options}}}}


def test_it_keeps_the_contract(trusted):
    check_plugin(Spotcheck, name=NAME, class_counts=(2, 10), options={"endpoint": trusted.url, "share": 0.5})


def test_every_lie_that_is_drawn_becomes_evidence(fides_pipeline, trusted, tmp_path):
    logits = fake_logits(6)
    plugin = Spotcheck()
    pipeline = fides_pipeline(
        plugin, mode="flag", **settings(trusted, share=1, evidence=str(tmp_path / "evidence.jsonl"))
    )
    query = fake_query(logits, request_ids=tuple("abcdef"), model_name="digits")
    lie = Prediction.from_output(switch_top_two(logits, rows=[1, 4]), "logits")

    verdict = pipeline.run(query, lie)

    assert verdict.status.tolist() == [0, 1, 0, 0, 1, 0]
    lines = [json.loads(line) for line in (tmp_path / "evidence.jsonl").read_text().splitlines()]
    assert [line["request_id"] for line in lines] == ["b", "e"]
    assert lines[0]["model"] == "digits"
    assert lines[0]["trusted"]["label"] == int(logits[1].argmax())
    assert lines[0]["service"]["label"] == int(lie.label[1]) != lines[0]["trusted"]["label"]
    assert len(lines[0]["input_sha256"]) == 64
    assert lines[0]["input_sha256"] != lines[1]["input_sha256"]
    assert plugin.counts == {"checked": 6, "mismatches": 2, "written": 2}


def test_rows_not_drawn_get_no_opinion(fides_pipeline, trusted, monkeypatch):
    logits = fake_logits(4)
    monkeypatch.setattr("fides_spotcheck.draw", lambda n, share: np.array([True, False, False, False]))
    pipeline = fides_pipeline(Spotcheck, mode="flag", **settings(trusted))
    lie = Prediction.from_output(switch_top_two(logits), "logits")
    verdict = pipeline.run(fake_query(logits), lie)
    assert verdict.status_text.tolist() == ["attacked", "indeterminate", "indeterminate", "indeterminate"]


def test_only_the_drawn_rows_are_re_run(fides_pipeline):
    seen = []

    def predict(inputs):
        seen.append(len(inputs["pixels"]))
        return inputs["pixels"]

    logits = fake_logits(200)
    with OipServer(predict) as server:
        pipeline = fides_pipeline(Spotcheck, **settings(server, share=0.1))
        for _ in range(20):
            pipeline.run(fake_query(logits), Prediction.from_output(logits, "logits"))
    # 4,000 rows at 10%: a binomial with standard deviation 19, so 5 of them around 400.
    assert 300 < sum(seen) < 500


def test_the_draw_is_not_the_same_twice():
    assert draw(64, 0.5).tolist() != draw(64, 0.5).tolist()
    assert draw(0, 0.5).tolist() == []
    assert draw(5, 1.0).all()


def test_an_unreachable_copy_is_an_error_never_trust(fides_pipeline):
    with OipServer(lambda inputs: inputs["missing"]) as server:
        pipeline = fides_pipeline(Spotcheck, mode="flag", **settings(server, share=1))
        logits = fake_logits(3)
        verdict = pipeline.run(fake_query(logits), Prediction.from_output(logits, "logits"))
    assert verdict.counts()["error"] == 3
    assert NAME.capitalize() in verdict.reason[0]


def test_a_file_that_cannot_be_written_does_not_undo_the_alarm(fides_pipeline, trusted, tmp_path):
    plugin = Spotcheck()
    logits = fake_logits(2)
    pipeline = fides_pipeline(plugin, mode="flag", **settings(trusted, share=1, evidence=str(tmp_path / "no" / "x")))
    verdict = pipeline.run(fake_query(logits), Prediction.from_output(switch_top_two(logits), "logits"))
    assert verdict.counts()["attacked"] == 2
    assert plugin.counts["lost"] == 2


def test_rows_until_caught_against_a_simulation():
    needed = rows_until_caught(share=0.1, lies=0.3, confidence=0.95)
    assert needed == 99
    rng = np.random.default_rng(0)
    caught = (rng.random((4000, needed)) < 0.03).any(axis=1).mean()
    # Binomial standard error 0.0035; the exact value is 1 - 0.97**99 = 0.951.
    assert abs(caught - 0.951) < 0.014


def test_senseless_options_stop_the_start(fides_manager, trusted):
    with pytest.raises(SettingsError, match="no trusted copy"):
        fides_manager(Spotcheck)
    with pytest.raises(SettingsError, match="share"):
        fides_manager(Spotcheck, **settings(trusted, share=0))
