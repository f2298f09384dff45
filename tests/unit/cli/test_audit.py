"""`fides audit` from a shell: recordings that are judged, those that cannot be, and logs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from typer.testing import CliRunner

from fides_plugins.audit.writer import AuditOptions, LaneWriter
from fides_plugins.cli import app
from tests.support.recordings import PAIRS, recorded, write_parquet


def test_audit_run(tmp_path: Path, bundle_folder: Path) -> None:
    source = write_parquet(tmp_path / "in", recorded(400, share=0.2), *PAIRS)
    arguments = ["audit", "run", "--bundle", str(bundle_folder), "--input", str(source), "--out"]
    result = CliRunner().invoke(app, [*arguments, str(tmp_path / "a.parquet"), "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["rows"] == 400
    result = CliRunner().invoke(app, [*arguments, str(tmp_path / "b.parquet"), "--check"])
    assert result.exit_code == 1
    assert "400 of 400 rows judged" in result.stdout


CLEAN = recorded(40, share=0)
SERVICE, REFERENCE = PAIRS[1:]
NAN = np.full_like(CLEAN[SERVICE], np.nan)


@pytest.mark.parametrize(
    ("service", "reference", "fault", "reason"),
    [
        (
            "service_logits",
            REFERENCE,
            {"service_logits": CLEAN["service_logits"][:, :9]},
            "service_logits has 9 numbers, but the bundle has 10 classes",
        ),
        (
            SERVICE,
            "verification_logits",
            {"verification_logits": CLEAN["verification_logits"][:, :9]},
            "verification_logits has 9 numbers, but the bundle has 10 classes",
        ),
        (
            SERVICE,
            REFERENCE,
            {SERVICE: CLEAN["service_logits"]},
            "service_probabilities does not hold probabilities; are these logits?",
        ),
        (SERVICE, "input", {"input": CLEAN["input"][:, :7]}, "input does not fit the shape (10,)"),
        (SERVICE, REFERENCE, {REFERENCE: NAN}, "verification_probabilities holds numbers that are not finite"),
        (SERVICE, REFERENCE, {SERVICE: NAN}, "not a finite class distribution"),
    ],
    ids=["nine classes", "nine references", "logits as probabilities", "wrong input", "nan references", "nan service"],
)
def test_a_recording_that_cannot_be_judged_fails_the_check(
    tmp_path: Path, bundle_folder: Path, service: str, reference: str, fault: dict[str, NDArray[Any]], reason: str
) -> None:
    source = write_parquet(tmp_path / "in", {**CLEAN, **fault}, service, reference)
    arguments = ["audit", "run", "--bundle", str(bundle_folder), "--input", str(source), "--out"]
    found = CliRunner().invoke(app, [*arguments, str(tmp_path / "a"), "--check", "--max-unjudged", "1"])
    assert found.exit_code == 1, found.output
    assert "40 of 40 rows could not be judged" in found.output
    assert "explains" not in found.output
    assert reason in found.output
    found = CliRunner().invoke(app, [*arguments, str(tmp_path / "b"), "--json"])
    assert found.exit_code == 0
    summary = json.loads(found.stdout)
    assert (summary["judged"], summary["attacked_share"], summary["more_than_false_alarms"]) == (0, None, None)


def test_a_share_without_a_verdict_fails_the_check(tmp_path: Path, bundle_folder: Path) -> None:
    columns = recorded(100, share=0)
    columns["service_probabilities"][:10] = np.nan
    source = write_parquet(tmp_path / "in", columns, *PAIRS)
    arguments = ["audit", "run", "--bundle", str(bundle_folder), "--input", str(source), "--check", "--out"]
    found = CliRunner().invoke(app, [*arguments, str(tmp_path / "a")])
    assert found.exit_code == 1
    assert "10 of 100 rows could not be judged" in found.output
    found = CliRunner().invoke(app, [*arguments, str(tmp_path / "b"), "--max-unjudged", "0.1"])
    assert found.exit_code == 0, found.output


def test_audit_verify(tmp_path: Path) -> None:
    log = LaneWriter(AuditOptions(path=str(tmp_path / "log")), {})
    log.put(2, lambda: [{"kind": "row", "status": "attacked"}] * 2)
    log.close()
    result = CliRunner().invoke(app, ["audit", "verify", str(tmp_path / "log"), "--json"])
    assert result.exit_code == 0
    (tmp_path / "anchor.json").write_text(result.stdout)
    result = CliRunner().invoke(
        app, ["audit", "verify", str(tmp_path / "log"), "--anchor", str(tmp_path / "anchor.json")]
    )
    assert (result.exit_code, "Every line holds" in result.stdout) == (0, True)
    path = tmp_path / "log" / "lane-00" / "00000000.jsonl"
    path.write_text(path.read_text().replace("attacked", "trusted", 1))
    result = CliRunner().invoke(app, ["audit", "verify", str(tmp_path / "log")])
    assert result.exit_code == 1
    assert "was altered" in result.stdout
