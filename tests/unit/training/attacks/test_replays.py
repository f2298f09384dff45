"""Replays: whose answers they are, and what they keep of the right one."""

from __future__ import annotations

import numpy as np
import pytest

from fides_plugins.training.attacks.replays import REPLAYS, RankedAnswers, Replay
from fides_plugins.training.evaluation.synthetic import synthetic_pair

SERVICE = synthetic_pair(4000, 10, signal=3.0).service
BY_NAME = {replay.name: replay for replay in REPLAYS}


def drawn(name: str) -> tuple[np.ndarray, np.ndarray]:
    return BY_NAME[name].apply(RankedAnswers(SERVICE), np.random.default_rng(1))


@pytest.mark.parametrize("replay", REPLAYS, ids=lambda r: r.name)
def test_every_replay_is_a_genuine_answer_to_another_input(replay: Replay):
    answers, rows = replay.apply(RankedAnswers(SERVICE), np.random.default_rng(0))
    assert len(answers) == len(rows) > 1000
    genuine = {row.tobytes() for row in SERVICE}
    assert all(answer.tobytes() in genuine for answer in answers)
    assert not (answers == SERVICE[rows]).all(axis=1).any()
    changed = answers.argmax(axis=1) != SERVICE[rows].argmax(axis=1)
    assert changed.all() if replay.changes_label else not changed.any()


@pytest.mark.parametrize("name", ["replay-near", "replay-like"])
def test_careful_replays_find_the_right_class_plausible(name: str):
    answers, rows = drawn(name)
    runner_up = np.argsort(-answers, axis=1)[:, 1]
    assert (runner_up == SERVICE[rows].argmax(axis=1)).all()


def test_the_most_careful_one_is_about_as_sure_as_the_right_answer():
    apart = {name: np.abs(a.max(axis=1) - SERVICE[r].max(axis=1)).mean() for name, (a, r) in both().items()}
    assert apart["replay-like"] < 0.3 * apart["replay-near"]


def both() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    return {name: drawn(name) for name in ("replay-near", "replay-like")}


def test_a_class_that_no_other_answer_offers_gets_any_answer():
    # Three classes; the third is chosen once and never a runner-up.
    service = np.array([[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.3, 0.6, 0.1], [0.2, 0.1, 0.7]], np.float32)
    for replay in REPLAYS:
        answers, rows = replay.apply(RankedAnswers(service), np.random.default_rng(0))
        assert len(answers) == len(rows)
        assert np.isfinite(answers).all()
