"""What an operator does with a protected Triton: check it, withdraw its alarm, notice that it is dead."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from fides_plugins.launch.process import free_ports, wait_until
from fides_plugins.launch.triton import TritonServer, is_available
from fides_plugins.serving.triton.attach import attach
from fides_plugins.serving.triton.operator.api import InferenceRefused, TritonApi
from fides_plugins.serving.triton.operator.check import check
from fides_plugins.serving.triton.operator.watch import Event, Watcher
from fides_plugins.serving.triton.plan import AttachOptions
from fides_plugins.testing import fake_logits
from tests.support.command_line import fides
from tests.support.triton_models import (
    STRANGER_CONFIG,
    image_bundle,
    images,
    linear_image_onnx,
    set_parameter,
    stranger_repository,
)

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(not is_available(), reason="no Triton server for this platform"),
]

ALARM = 'fides_under_attack{model="flowers"}'
PIXELS = images(fake_logits(4, seed=31))


def make_repository(root: Path) -> Path:
    """`flowers`, and `roses`, whose service model disagrees with the verification model on noise."""
    repository = stranger_repository(root / "repository")
    stranger_repository(repository, STRANGER_CONFIG.replace('"flowers"', '"roses"'), model="roses")
    (repository / "roses" / "3" / "net.onnx").write_bytes(linear_image_onnx("pixels_in", "scores", noise=2.0))
    bundle = image_bundle(root / "bundle")
    for model in ("flowers", "roses"):
        attach(repository, model, AttachOptions(bundle, settings={"mode": "flag"}))
    return repository


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_repository(tmp_path_factory.mktemp("operations"))


@pytest.fixture(scope="module")
def server(repository: Path) -> Iterator[TritonServer]:
    with TritonServer(repository, explicit=True, config_name="fides", auto_complete=False, grace_s=1.0) as running:
        yield running


def value(api: TritonApi, series: str) -> float | None:
    """One series of the metrics page; None where it is not there."""
    found = re.search(rf"^{re.escape(series)} (\S+)$", api.metrics(), re.MULTILINE)
    return None if found is None else float(found[1])


def verdicts(api: TritonApi, model: str) -> dict[str, float | None]:
    return {s: value(api, f'fides_verdicts_total{{model="{model}",status="{s}"}}') for s in ("attacked", "trusted")}


def test_checks_never_raise_the_service_alarm(server: TritonServer) -> None:
    """Of noise the two models of `roses` think differently, as trained models do: it would count as attacked."""
    api = server.api
    for _ in range(5):
        findings = {f.what: f for f in check(api, "roses")}
        assert all(f.good for f in findings.values())
        assert findings["validation"].detail == "verdict: attacked"
        assert "it would be counted as attacked" in findings["protected model"].detail
        assert "--data" in findings["protected model"].remedy
    findings = {f.what: f for f in check(api, "flowers", {"pixels_in": PIXELS[:1]})}
    assert findings["protected model"].seconds > 0
    wait_until(lambda: verdicts(api, "flowers") == {"attacked": 0, "trusted": 1}, 10, "The benign row's count")
    assert verdicts(api, "roses") == {"attacked": 0, "trusted": 0}
    assert not value(api, 'fides_under_attack{model="roses"}')


@pytest.mark.parametrize("suspicious", [0, 16])
def test_a_check_picks_a_harmless_row_of_an_honest_batch_and_names_what_it_leaves(
    server: TritonServer, tmp_path: Path, suspicious: int
) -> None:
    """Of honest rows half have a p-value below 0.5; and a file may hold more rows than a batch, and labels."""
    before = verdicts(server.api, "roses")
    # Near the origin the two models of `roses` differ as trained models do: about half of the p-values are below 0.5.
    pixels = 0.03 * images(fake_logits(suspicious + 16, seed=5))
    pixels[:suspicious] *= 10
    p_values = server.api.infer("roses__fides", {"pixels_in": pixels[suspicious:]})["FIDES_P_VALUE"]
    assert p_values.min() < 0.5 < p_values.max()
    wait_until(lambda: verdicts(server.api, "roses")["trusted"] == (before["trusted"] or 0) + 16, 10, "These rows")
    np.savez(tmp_path / "honest.npz", pixels_in=pixels, labels=np.arange(len(pixels)))
    arguments = ("roses", "--data", tmp_path / "honest.npz", "--metrics", server.metrics_url, "--json")
    done = fides("check", "triton", server.http_address, *arguments)
    findings = {f["what"]: f for f in json.loads(done.stdout)["findings"]}
    assert done.returncode == 0, done.stdout + done.stderr
    assert findings["data"] == {
        "what": "data", "good": None, "milliseconds": None,
        "detail": "not used: labels", "remedy": "roses takes: pixels_in.",
    }  # fmt: skip
    assert findings["protected model"]["milliseconds"] is not None, findings
    row = {"attacked": before["attacked"], "trusted": (before["trusted"] or 0) + 17}
    wait_until(lambda: verdicts(server.api, "roses") == row, 10, "The count of the one row that was sent through")


def test_a_check_without_any_array_that_the_model_takes_is_no_success(server: TritonServer) -> None:
    findings = {f.what: f for f in check(server.api, "flowers", {"pixels": PIXELS})}
    assert findings["data"].good is False
    assert "not used: pixels" in findings["data"].detail
    assert "pixels_in" in findings["data"].remedy
    assert findings["protected model"].good is False


def attack(api: TritonApi) -> None:
    for _ in range(50):
        api.infer("flowers", {"pixels_in": PIXELS}, parameters={"attack": "all"})
    wait_until(lambda: value(api, ALARM) == 1.0, 10, "The alarm")


def test_a_reset_withdraws_the_alarm_and_only_if_the_attack_is_over(server: TritonServer) -> None:
    api = server.api
    # The first load after a start may load anything, because Python's caches are new files; see triton-failure.md.
    api.load("flowers__fides_validate")
    attack(api)
    pids = server.stub_pids("flowers__fides_validate")
    # What the runbook said once: for a step whose files did not change it does nothing.
    api.load("flowers__fides_validate")
    assert server.stub_pids("flowers__fides_validate") == pids
    assert value(api, ALARM) == 1.0
    done = fides("reset", "triton", server.http_address, "flowers", "--metrics", server.metrics_url)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the service alarm of flowers is withdrawn" in done.stdout
    assert value(api, ALARM) == 0.0
    assert set(server.stub_pids("flowers__fides_validate")).isdisjoint(pids)
    attack(api)


def test_a_raised_alarm_is_a_line_of_its_own_and_no_success(server: TritonServer) -> None:
    """Every step works, and yet this is no service to trust: scripts ask for the exit status."""
    attack(server.api)
    address, metrics = server.http_address, ("--metrics", server.metrics_url)
    checked = fides("check", "triton", address, "flowers", "--json", *metrics)
    assert checked.returncode == 1, checked.stdout + checked.stderr
    (alarm,) = (f for f in json.loads(checked.stdout)["findings"] if f["good"] is False)
    assert alarm["what"] == "service alarm"
    assert "flowers is under attack" in alarm["detail"]
    assert "fides reset triton" in alarm["remedy"]
    watched = fides("watch", "triton", address, "--once", *metrics)
    # Another status than that of a dead step: a restart would withdraw the alarm and heal nothing.
    assert watched.returncode == 3, watched.stdout + watched.stderr
    (line,) = watched.stdout.splitlines()
    assert " alarm flowers " in line
    quiet = fides("watch", "triton", address, "--once", "--model", "roses", *metrics)
    assert (quiet.returncode, quiet.stdout) == (0, ""), quiet.stdout + quiet.stderr


def test_a_watch_that_starts_changes_the_processes_whose_files_changed_and_no_other(
    server: TritonServer, repository: Path
) -> None:
    """What its help says: settling loads what is on disk, the service too, and a new validation knows no alarm."""
    # Not hasty: a busy machine must not make it take a step for dead, which changes processes, too.
    start = partial(Watcher, server.api, model="flowers", timeout_s=10.0)
    start().look()
    attack(server.api)
    steps = ("flowers__base", "flowers__fides_verify", "flowers__fides_validate", "flowers__fides_fallback")

    def pids() -> dict[str, list[int]]:
        """Of every step its one process; those that were replaced end a little later."""
        wait_until(lambda: all(len(server.stub_pids(step)) == 1 for step in steps), 20, "The end of old processes")
        return {step: server.stub_pids(step) for step in steps}

    before = pids()
    events: list[Event] = []
    settled = [("settled", "flowers__fides_fallback"), ("settled", "flowers")]
    start(report=events.append).look()
    assert [(e.kind, e.model) for e in events] == settled
    assert pids() == before
    assert value(server.api, ALARM) == 1.0
    os.utime(repository / "flowers" / "3" / "net.onnx")
    os.utime(repository / "flowers__fides_validate" / "1" / "model.py")
    start(report=events.append).look()
    assert [(e.kind, e.model) for e in events] == 2 * settled
    after = pids()
    assert {step for step in steps if after[step] != before[step]} == {"flowers__base", "flowers__fides_validate"}
    wait_until(lambda: value(server.api, ALARM) == 0.0, 10, "The withdrawn alarm")
    # As it comes from a terminal: in lines of any width, and perhaps in colours.
    said = " ".join(re.sub(r"\x1b\[[0-9;]*m", "", fides("watch", "triton", "--help").stdout).split())
    assert "their processes change" in said


def test_an_alarm_that_cannot_be_seen_is_unknown_and_never_quiet(server: TritonServer) -> None:
    (closed,) = free_ports(1)
    unread = ("--metrics", f"127.0.0.1:{closed}")
    checked = fides("check", "triton", server.http_address, "roses", "--json", *unread)
    (alarm,) = (f for f in json.loads(checked.stdout)["findings"] if f["what"] == "service alarm")
    assert alarm["good"] is None
    assert f"http://127.0.0.1:{closed}/metrics" in alarm["detail"]
    assert "--metrics" in alarm["remedy"]
    watched = fides("watch", "triton", server.http_address, "--once", *unread)
    # Liveness is another question: a server whose metrics are off need not be restarted.
    assert watched.returncode == 0, watched.stdout + watched.stderr
    assert "alarm_unknown flowers" in watched.stdout
    assert "alarm_unknown roses" in watched.stdout


def test_a_reset_that_cannot_read_the_metrics_says_how_to_name_them(server: TritonServer) -> None:
    (closed,) = free_ports(1)
    pids = server.stub_pids("roses__fides_validate")
    done = fides("reset", "triton", server.http_address, "roses", "--metrics", f"127.0.0.1:{closed}")
    assert done.returncode == 2
    assert f"The metrics at http://127.0.0.1:{closed}/metrics cannot be read" in done.stderr
    assert "--metrics" in done.stderr
    assert server.stub_pids("roses__fides_validate") == pids


def test_another_mode_takes_effect_by_the_steps_file_and_a_load(server: TritonServer, repository: Path) -> None:
    """Step 1 of the runbook, on a running server: no request is lost, and the verdict's step alone is loaded."""
    file = repository / "flowers__fides_validate" / "config.pbtxt"
    before = file.read_text()
    assert server.api.infer("flowers", {"pixels_in": PIXELS}, parameters={"attack": "all"})["scores"].shape == (4, 10)
    set_parameter(file, "fides.mode", "reject")
    try:
        server.api.load("flowers__fides_validate")
        with pytest.raises(InferenceRefused, match="attacked: refused 4 of 4"):
            server.api.infer("flowers", {"pixels_in": PIXELS}, parameters={"attack": "all"})
    finally:
        file.write_text(before)
        server.api.load("flowers__fides_validate")


def test_outside_explicit_mode_the_commands_say_so_and_end(repository: Path) -> None:
    with TritonServer(repository, config_name="fides", auto_complete=False, grace_s=1.0) as server:
        for command in (("reset", "triton", server.http_address, "flowers", "--metrics", server.metrics_url),
                        ("watch", "triton", server.http_address)):  # fmt: skip
            found = fides(*command)
            assert found.returncode == 2, found.stdout + found.stderr
            assert "--model-control-mode=explicit" in found.stderr
            assert "polling" not in found.stdout + found.stderr
        assert fides("watch", "triton", server.http_address, "--once").returncode == 0


def test_a_mistyped_model_is_said_and_ends_the_watch(server: TritonServer) -> None:
    found = fides("watch", "triton", server.http_address, "--model", "flower")
    assert found.returncode == 2
    assert "has no model 'flower'" in found.stderr
    assert "flowers" in found.stderr
    assert found.stdout == ""
