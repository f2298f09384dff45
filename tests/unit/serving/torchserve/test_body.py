"""Body-level capture: declared JSON paths and declared modules."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fides_plugins.errors import InputError, SettingsError
from fides_plugins.serving.torchserve.body import make_parser
from fides_plugins.serving.torchserve.body_capture import Bodies
from fides_plugins.serving.torchserve.judge import InferenceJudge
from fides_plugins.serving.torchserve.options import BodyFormat, HostOptions, read_section
from fides_plugins.settings import Settings
from fides_plugins.testing import fake_logits, make_bundle, switch_top_two
from fides_plugins.types import Status, softmax


def test_json_paths_read_and_write() -> None:
    parser = make_parser(BodyFormat(request="instances.0.x", response="result.1"))
    assert parser.request({"body": b'{"instances": [{"x": [1, 2]}]}'}).tolist() == [1, 2]
    assert parser.request({"data": {"instances": [{"x": [1, 2]}]}}).dtype == np.float32
    answer = {"model": "m", "result": ["a", {"cat": 0.9, "dog": 0.1}]}
    assert parser.response(json.dumps(answer)).tolist() == [0.9, 0.1]
    assert parser.replace is not None
    changed = parser.replace(answer, np.array([0.25, 0.75]))
    assert changed == {"model": "m", "result": ["a", {"cat": 0.25, "dog": 0.75}]}
    assert answer["result"][1] == {"cat": 0.9, "dog": 0.1}
    assert json.loads(parser.replace(json.dumps(answer), np.array([0.5, 0.5])))["result"][1]["cat"] == 0.5


@pytest.mark.parametrize(
    "item", [{"body": b"\xff"}, {"body": b"{}"}, {"body": b'{"x": "a"}'}, {}, None, {"body": b"["}]
)
def test_unreadable_requests_are_input_errors(item: object) -> None:
    with pytest.raises(InputError):
        make_parser(BodyFormat(request="x")).request(item)


def test_modules_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "body_parser_half.py").write_text("def request(item): return item\n")
    (tmp_path / "body_parser_broken.py").write_text("raise ValueError\n")
    for name in ("body_parser_half.py", "body_parser_broken", "body_parser_absent"):
        with pytest.raises(SettingsError):
            make_parser(name)


def test_one_bad_body_spoils_no_other(tmp_path: Path) -> None:
    make_bundle(tmp_path / "bundle", output_kind="probabilities")
    judge = InferenceJudge(Settings(bundle=str(tmp_path / "bundle"), mode="correct"), "m")
    parser = make_parser(BodyFormat(request="x", response="p"))
    logits = fake_logits(5, seed=3)
    honest = softmax(logits)
    told = switch_top_two(honest, [1])
    data = [{"body": {"x": row.tolist()}} for row in logits]
    data[2] = {"body": b"garbage"}
    data[3] = {"body": {"x": [1.0]}}
    answers: list[object] = [{"p": row.tolist(), "kept": i} for i, row in enumerate(told)]
    answers[4] = {"q": 1}
    verdicts, changed = Bodies(judge, parser, data).judge(answers)
    statuses = [v.status for v in verdicts]
    assert statuses == [Status.TRUSTED, Status.ATTACKED, Status.ERROR, Status.ERROR, Status.ERROR]
    assert [changed[i] is answers[i] for i in range(5)] == [True, False, True, True, True]
    np.testing.assert_allclose(changed[1]["p"], honest[1], atol=1e-5)
    assert changed[1]["kept"] == 1
    judge.protection.close()


def test_section_finds_a_bundle_that_the_archiver_flattened(tmp_path: Path) -> None:
    make_bundle(tmp_path / "bundle")
    config = {"minWorkers": 1, "fides": {"handler": "mine.py", "bundle": "bundle", "mode": "flag"}}
    assert read_section(config, tmp_path)[1].bundle == str(tmp_path / "bundle")
    options, settings = read_section(config, tmp_path / "bundle")
    assert (settings.bundle, settings.mode) == (str(tmp_path / "bundle"), "flag")
    assert options == HostOptions(handler="mine.py")


@pytest.mark.parametrize(
    "section",
    [None, {}, {"mode": "flag"}, {"handler": ""}, {"handler": "a", "row": "any"}, {"handler": "a", "rows": 3}],
)
def test_wrong_sections_are_refused(section: object) -> None:
    with pytest.raises(SettingsError):
        read_section({"fides": section}, ".")
