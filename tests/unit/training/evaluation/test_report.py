"""The report page: complete, self-contained, and whole in a real browser."""

from __future__ import annotations

import html
import io
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from fides_plugins.bundle import Bundle
from fides_plugins.training.attacks import default_registry
from fides_plugins.training.detector.detection import fit_predictions
from fides_plugins.training.evaluation.evaluate import evaluate
from fides_plugins.training.evaluation.report import picture, render
from fides_plugins.training.evaluation.synthetic import synthetic_pair
from tests.support.docs_blocks import REPOSITORY

BROWSER = next((p for p in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if p), None)
SECTIONS = ("attacks", "comparison", "escalation", "monitor", "curves", "scores", "agreement", "cost", "worst")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("report")
    fit, test = synthetic_pair(900, 5, signal=3.0), synthetic_pair(400, 5, signal=3.0, seed=1)
    np.savez(root / "fit.npz", service_probabilities=fit.service, verification_probabilities=fit.verification)
    names = ("<b>cat</b>", "dog", "fox", "owl", "bee")
    bundle = fit_predictions(root / "fit.npz", root / "bundle", class_names=names, attacks=("switch", "random"))
    found = evaluate(bundle, test, registry=default_registry(), unseen=False)
    images = np.random.default_rng(0).random((400, 1, 12, 12), dtype=np.float32)
    (root / "out.html").write_text(render(Bundle.load(root / "bundle"), test, found, images), encoding="utf-8")
    return root / "out.html"


def test_every_section_is_there_and_nothing_comes_from_elsewhere(page: Path):
    text = page.read_text(encoding="utf-8")
    for section in SECTIONS:
        assert f'id="{section}"' in text
    for name in ("switch", "random", "average", "targeted", "confidence"):
        assert f"<figcaption>{name}</figcaption>" in text
    assert "<script" not in text
    sources = re.findall(r"""(?:src|href)\s*=\s*["']([^"']*)""", text) + re.findall(r"url\(([^)]*)\)", text)
    assert sources
    assert all(s.startswith("data:image/png;base64,") for s in sources)


def test_the_how_to_explains_every_part_and_column(page: Path):
    guide = (REPOSITORY / "docs" / "how-to" / "evaluation-report.md").read_text()
    text = html.unescape(page.read_text(encoding="utf-8"))
    headings = re.findall(r"<h2[^>]*>([^<]+)</h2>", text)
    assert len(headings) == len(SECTIONS)
    for heading in (*headings, "The same attacks, each left out of training"):
        assert f"\n## {heading}\n" in guide
    columns = re.search(r"<tr><th>attack</th><th>rows</th>(.*?)</tr>", text)
    assert columns is not None
    for column in re.findall(r"<th>([^<]+)</th>", columns[1]):
        assert column in guide, column


def test_class_names_are_text_not_markup(page: Path):
    text = page.read_text(encoding="utf-8")
    assert "<b>cat</b>" not in text
    assert "&lt;b&gt;cat&lt;/b&gt;" in text


@pytest.mark.parametrize(
    ("shape", "is_picture"),
    [
        *(((8, 8), True), ((1, 8, 8), True), ((3, 8, 8), True), ((8, 8, 3), True), ((8, 8, 1), True)),
        *(((64,), False), ((2, 8, 8), False), ((2, 2), False)),
    ],
)
def test_pictures_are_known_by_their_shape(shape: tuple[int, ...], is_picture: bool):
    found = picture(np.random.default_rng(0).normal(size=shape))
    assert (found is not None) == is_picture
    assert picture(np.zeros((8, 8), np.uint8)) is not None


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_a_browser_shows_it(page: Path, tmp_path: Path):
    from PIL import Image

    def browse(*arguments: str) -> bytes:
        command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        command += [f"--user-data-dir={tmp_path / 'profile'}", *arguments, page.as_uri()]
        return subprocess.run(command, check=True, capture_output=True, timeout=120, cwd=tmp_path).stdout

    document = browse("--dump-dom").decode()
    # Of each of the five attacks: its second look, its ROC curve beside those of two rules, its scores.
    assert document.count("<svg") == 15
    assert document.count("<polyline") == 20
    for width in (1200, 420):
        shot = tmp_path / f"{width}.png"
        browse(f"--screenshot={shot}", f"--window-size={width},2600")
        image = np.asarray(Image.open(io.BytesIO(shot.read_bytes())).convert("RGB")).astype(int)
        assert image.shape[1] == width
        # Every part of the page's height shows something, and more than one colour is used for it.
        for band in np.array_split(image, 8):
            assert (np.ptp(band.reshape(-1, 3), axis=0) > 60).all()
        if width == 1200:  # the learned detector's curve; on a phone it is further down
            assert (np.abs(image - np.array([0x1F, 0x5F, 0xBF])).sum(axis=2) < 30).any()
