import logging
import time

import numpy as np
import pytest
from fides_consensus import NAME, Consensus, vote

from fides_plugins import Prediction, SettingsError
from fides_plugins.errors import InputError
from fides_plugins.testing import OipServer, check_plugin, fake_logits, fake_query, switch_top_two
from fides_plugins.types import softmax


def honest(inputs):
    return inputs["pixels"]


def lying(inputs):
    return switch_top_two(inputs["pixels"])


def broken(inputs):
    raise RuntimeError("down")


def options(servers, **more):
    return {"plugins": {"options": {NAME: {"replicas": {n: s.url for n, s in servers.items()}, **more}}}}


@pytest.fixture
def replicas():
    with OipServer(honest) as a, OipServer(honest) as b, OipServer(honest) as c:
        yield {"a": a, "b": b, "c": c}


def test_it_keeps_the_contract(replicas):
    report = check_plugin(
        Consensus, name=NAME, class_counts=(2, 10), options={"replicas": [s.url for s in replicas.values()]}
    )
    assert set(report.hooks) == {"fides_configure", "fides_unconfigure", "fides_verify", "fides_detect"}


def test_a_lying_replica_is_outvoted_and_named_and_the_service_is_trusted(fides_pipeline, replicas, caplog):
    logits = fake_logits(6)
    plugin = Consensus()
    with OipServer(lying) as liar:
        pipeline = fides_pipeline(plugin, mode="flag", **options({**replicas, "b": liar}))
        with caplog.at_level(logging.WARNING, "fides_consensus"):
            verdict = pipeline.run(fake_query(logits), Prediction.from_output(logits, "logits"))
    assert verdict.counts()["trusted"] == 6
    assert plugin.outvoted == {"b": 6}
    assert "outvoted: b in 6 row(s)" in caplog.text


def test_a_lying_service_is_attacked_by_name_of_the_vote(fides_pipeline, replicas):
    logits = fake_logits(6)
    lie = Prediction.from_output(switch_top_two(logits, rows=[1, 4]), "logits")
    # The built-in detector is left out: the vote alone must find it.
    values = options(replicas)
    values["plugins"]["blocked"] = ["detector"]
    verdict = fides_pipeline(Consensus, mode="correct", **values).run(fake_query(logits), lie)
    assert verdict.status.tolist() == [0, 1, 0, 0, 1, 0]
    assert NAME in verdict.reason[1]
    assert verdict.label.tolist() == logits.argmax(axis=1).tolist()


def test_service_and_one_replica_lying_together_are_both_named(fides_pipeline, replicas):
    logits = fake_logits(3)
    lie = Prediction.from_output(switch_top_two(logits), "logits")
    with OipServer(lying) as liar:
        verdict = fides_pipeline(Consensus, mode="flag", **options({**replicas, "c": liar})).run(
            fake_query(logits), lie
        )
    assert verdict.counts()["attacked"] == 3
    assert "consensus, outvoting c" in verdict.reason[0]


def test_without_a_majority_the_vote_has_no_opinion(fides_pipeline, replicas):
    logits = fake_logits(3)
    plugin = Consensus()
    with OipServer(broken) as down, OipServer(lying) as liar:
        values = options({"a": replicas["a"], "b": down, "c": liar})
        values["plugins"]["blocked"] = ["detector"]
        pipeline = fides_pipeline(plugin, mode="flag", **values)
        verdict = pipeline.run(fake_query(logits), Prediction.from_output(logits, "logits"))
    # One honest vote, one lie, one silent: nobody has more than half.
    assert verdict.counts()["indeterminate"] == 3
    assert plugin.silent == {"b": 1}


def test_silence_of_all_replicas_is_an_error_never_trust(fides_pipeline):
    logits = fake_logits(3)
    with OipServer(broken) as a, OipServer(broken) as b, OipServer(broken) as c:
        pipeline = fides_pipeline(Consensus, mode="flag", **options({"a": a, "b": b, "c": c}))
        verdict = pipeline.run(fake_query(logits), Prediction.from_output(logits, "logits"))
    assert verdict.counts()["error"] == 3


def test_replicas_are_asked_at_the_same_time(fides_pipeline):
    def slow(inputs):
        time.sleep(0.3)
        return inputs["pixels"]

    logits = fake_logits(2)
    with OipServer(slow) as a, OipServer(slow) as b, OipServer(slow) as c:
        pipeline = fides_pipeline(Consensus, timeout_ms=5000, **options({"a": a, "b": b, "c": c}))
        start = time.perf_counter()
        pipeline.run(fake_query(logits), Prediction.from_output(logits, "logits"))
    assert time.perf_counter() - start < 0.8


def test_the_vote_by_hand():
    answers = softmax(np.array([[[4.0, 0, 0]], [[4.01, 0, 0]], [[0, 4.0, 0]]]))
    answered = np.ones((3, 1), bool)
    outcome = vote(answers, answered, 0.05)
    np.testing.assert_allclose(outcome.reference[0], answers[:2, 0].mean(axis=0), rtol=1e-6)
    assert outcome.outvoted[:, 0].tolist() == [False, False, True]
    # A replica that stays silent counts against the majority: one of three is none.
    answered[1] = False
    assert not vote(answers, answered, 0.05).decided[0]


@pytest.mark.parametrize("replicas_", [[], ["http://h:1/v2/models/m", "http://h:2/v2/models/m"]])
def test_two_replicas_are_too_few(fides_manager, replicas_):
    with pytest.raises(SettingsError, match="at least three"):
        fides_manager(Consensus, plugins={"options": {NAME: {"replicas": replicas_}}})


def test_text_with_commas_as_triton_parameters_give_it(fides_manager):
    plugin = Consensus()
    text = "north=http://h:1/v2/models/m, http://h:2/v2/models/m,http://h:3/v2/models/m/versions/2"
    fides_manager(plugin, plugins={"options": {NAME: {"replicas": text}}})
    assert list(plugin._replicas) == ["north", "h:2/m", "h:3/m/versions/2"]
    with pytest.raises(InputError, match="no model address"):
        fides_manager(Consensus, plugins={"options": {NAME: {"replicas": "a,b,c"}}})
