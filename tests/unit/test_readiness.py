"""Whether a bundle is good enough for a mode: the grade, where it is told, and who refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fides_plugins.bundle import Bundle
from fides_plugins.cli import app
from fides_plugins.errors import SettingsError
from fides_plugins.readiness import KEY, Readiness, require_ready
from fides_plugins.testing import make_bundle

GOOD: dict[str, Any] = {
    "rows": 1000,
    "budget": 0.01,
    "agreement": 0.95,
    "caught": {"switch": 0.8, "random": 0.9},
    "recovered": {"switch": 0.99, "random": 0.95},
    "harm": 0.002,
}


def ready(**changes: Any) -> Readiness:
    return Readiness.model_validate({**GOOD, **changes})


@pytest.mark.parametrize(
    ("changes", "grades"),
    [
        ({}, ("PASS", "PASS", "PASS", "PASS")),
        # A verification model that agrees in half of the rows may watch, and must not correct.
        ({"agreement": 0.5}, ("PASS", "PASS", "FAIL", "PASS")),
        ({"agreement": 0.8}, ("PASS", "PASS", "WARN", "PASS")),
        ({"caught": {"switch": 0.3, "random": 0.4}}, ("WARN", "WARN", "WARN", "WARN")),
        ({"caught": {"switch": 0.0, "random": 0.1}, "recovered": {}}, ("WARN", "FAIL", "FAIL", "FAIL")),
        ({"recovered": {"switch": 0.9, "random": 0.6}}, ("PASS", "PASS", "FAIL", "PASS")),
        ({"rows": 120}, ("WARN", "WARN", "WARN", "WARN")),
    ],
)
def test_grades(changes: dict[str, Any], grades: tuple[str, ...]):
    table = ready(**changes).table()
    assert [mode for mode, _, _ in table] == ["observe", "flag", "correct", "reject"]
    assert tuple(grade for _, grade, _ in table) == grades
    assert all(why.endswith(".") for _, _, why in table)


def test_the_sentence_says_what_to_expect():
    assert ready().sentence() == (
        "Expected at 0.01 false alarms: 80% of switch, 90% of random caught; the two models agree on 95.0%; `correct` "
        "would change 0.20% of honest answers. Measured on 1,000 rows."
    )


@pytest.fixture
def poor(tmp_path: Path) -> Path:
    """A bundle whose two models agree on half of the rows."""
    made = make_bundle(tmp_path / "made")
    manifest = made.manifest.model_copy(update={"provenance": {KEY: ready(agreement=0.5).model_dump()}})
    from fides_plugins.bundle import write_bundle

    write_bundle(tmp_path / "poor", manifest, {name: made.file(name) for name in made.file_names})
    return tmp_path / "poor"


def test_a_poor_bundle_observes_and_corrects_only_when_somebody_insists(poor: Path):
    bundle = Bundle.load(poor)
    assert require_ready(bundle, "observe") is not None
    with pytest.raises(
        SettingsError, match=r"not ready for the mode 'correct': agreement of the two models: 50%.*force"
    ):
        require_ready(bundle, "correct")
    forced = require_ready(bundle, "correct", force=True)
    assert forced is not None
    assert forced.grade == "FAIL"


def test_a_bundle_without_a_measure_is_not_graded(tmp_path: Path):
    assert require_ready(make_bundle(tmp_path / "b"), "correct") is None


def test_inspect_begins_with_it(poor: Path):
    run = CliRunner().invoke(app, ["inspect", str(poor)])
    assert run.exit_code == 0, run.output
    assert run.output.startswith("Expected at 0.01 false alarms")
    assert "FAIL" in run.output


@pytest.mark.parametrize("server", ["triton", "torchserve"])
def test_attach_refuses_before_it_writes_anything(poor: Path, tmp_path: Path, server: str):
    target = tmp_path / "target"
    target.mkdir()
    where = [str(target), "m"] if server == "triton" else [str(target), "--output", str(tmp_path / "out.mar")]
    run = CliRunner().invoke(app, ["attach", server, *where, "--bundle", str(poor), "--mode", "correct"])
    assert isinstance(run.exception, SettingsError)
    assert "not ready for the mode 'correct'" in str(run.exception)
    assert list(target.iterdir()) == []
