"""The demonstration's figures, through a real Triton, a real TorchServe and in process.

The service is trained and the bundle fitted once; the figures come from digits that neither saw.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from fides_plugins.cli import app
from fides_plugins.cli.demo import FALSE_ALARM_RATE
from fides_plugins.demo.digits import DigitsSplit, load_digits_split, train_service
from fides_plugins.demo.hosts import Deployment
from fides_plugins.demo.run import DemoFigures, fit_digits, make_host, measure

pytestmark = pytest.mark.integration

SEED = 0


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[DigitsSplit, bytes, Path]:
    folder = tmp_path_factory.mktemp("digits")
    split = load_digits_split(SEED)
    service = train_service(split.service, SEED)
    (folder / "service.onnx").write_bytes(service)
    return split, service, fit_digits(folder, split, SEED)


def check(figures: DemoFigures) -> None:
    """What the README promises for every server."""
    shares = {f.attack: f for f in figures.attacks}
    assert figures.false_alarm_rate == 0.02
    assert figures.unanswered == 0
    assert figures.false_alarms.value <= 0.035
    assert shares["random"].caught.value >= 0.96
    assert shares["switch"].caught.value >= 0.88
    for attack, share in shares.items():
        assert share.recovered.value >= 0.95, attack
        assert share.caught.rows > 400, attack
    assert {e.attack for e in figures.examples} == set(shares)
    assert all(e.status == "attacked" and e.corrected == e.honest != e.claimed for e in figures.examples)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("server", ["triton", "torchserve", "inprocess"])
def test_figures(server: str, trained: tuple[DigitsSplit, bytes, Path], tmp_path: Path):
    split, service, bundle = trained
    deployment = Deployment(service, bundle, tmp_path, FALSE_ALARM_RATE, SEED)
    with make_host(server, deployment) as host:
        figures = measure(host, deployment, split)
    check(figures)
    # Which of the two is slower is for the benchmarks to say: other work on the machine can turn them round.
    assert set(figures.latency_ms) == {"bare", "protected"}
    assert min(figures.latency_ms.values()) > 0


def test_parts_of_the_digits_share_no_row():
    split = load_digits_split(SEED)
    keys = [{r.tobytes() for r in part.images} for part in (split.service, split.fit, split.test)]
    # scikit-learn's digits hold no two equal images, so equal bytes would be the same row.
    assert sum(map(len, keys)) == len(set.union(*keys)) == 1797


def test_an_unknown_server_is_refused_before_any_work():
    result = CliRunner().invoke(app, ["demo", "--server", "tritom"])
    assert result.exit_code != 0
    assert "Choose one of: triton, torchserve, inprocess" in str(result.exception)
