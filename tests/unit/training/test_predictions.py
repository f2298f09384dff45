"""Files of predictions: what is read, and what is refused with which words."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fides_plugins.errors import TrainingError
from fides_plugins.training.predictions import Predictions, load_predictions
from fides_plugins.types import softmax


def logits(n: int = 40, k: int = 4, seed: int = 0) -> np.ndarray:
    return (3 * np.random.default_rng(seed).standard_normal((n, k))).astype(np.float32)


def saved(path: Path, **arrays: np.ndarray) -> Path:
    np.savez(path / "p.npz", **arrays)
    return path / "p.npz"


def good() -> dict[str, np.ndarray]:
    return {"service_logits": logits(), "verification_logits": logits(seed=1), "labels": np.arange(40) % 4}


def test_logits_and_probabilities_mean_the_same(tmp_path: Path):
    first = load_predictions(saved(tmp_path, **good()))
    arrays = {"service_probabilities": softmax(logits()), "verification_probabilities": softmax(logits(seed=1))}
    second = load_predictions(saved(tmp_path, **arrays))
    np.testing.assert_allclose(first.service, second.service, atol=1e-6)
    np.testing.assert_allclose(first.verification, second.verification, atol=1e-6)
    assert first.service_codec.kind == "logits"
    assert second.service_codec.kind == "probabilities"
    assert first.labels is not None
    assert second.labels is None


def test_temperatures_divide_logits(tmp_path: Path):
    rows = load_predictions(saved(tmp_path, **good()), service_temperature=2.0)
    np.testing.assert_allclose(rows.service, softmax(logits() / 2), atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": np.arange(40)}, r"36 value\(s\) outside 0..3, the first is 4 in row 4"),
        ({"labels": np.full(40, -1)}, "outside 0..3, the first is -1 in row 0"),
        ({"labels": np.zeros(39, np.int64)}, r"`labels` has shape \(39,\)"),
        ({"labels": np.zeros(40)}, "dtype float64"),
        ({"verification_logits": logits(k=5)}, "The service has 4 classes, the verification model 5"),
        ({"verification_logits": logits(n=39)}, "The service has 40 rows, the verification model 39"),
        ({"service_logits": np.where(np.arange(40)[:, None] == 7, np.nan, logits())}, "first is row 7"),
        ({"verification_logits": np.where(np.arange(40)[:, None] == 3, np.inf, logits())}, "`verification_logits`"),
        ({"service_logits": logits()[:, 0]}, "`service_logits`.*one row of classes"),
        ({"service_logits": logits(k=1), "verification_logits": logits(k=1)}, "one row of classes"),
        ({"service_logits": logits(n=0), "verification_logits": logits(n=0), "labels": np.zeros(0, int)}, "no rows"),
        ({"service_logits": logits().astype(str)}, "expected numbers"),
    ],
)
def test_unusable_arrays_are_refused_by_name(change: dict[str, np.ndarray], message: str, tmp_path: Path):
    with pytest.raises(TrainingError, match=message):
        load_predictions(saved(tmp_path, **{**good(), **change}))


def test_probabilities_that_are_none_are_refused(tmp_path: Path):
    arrays = {"service_probabilities": logits(), "verification_probabilities": softmax(logits())}
    with pytest.raises(TrainingError, match="no distribution, the first is row 0"):
        load_predictions(saved(tmp_path, **arrays))


def test_missing_arrays_are_listed(tmp_path: Path):
    with pytest.raises(TrainingError, match=r"neither `verification_logits` nor.*it has \['service_logits'\]"):
        load_predictions(saved(tmp_path, service_logits=logits()))


def test_files_that_are_no_archives(tmp_path: Path):
    with pytest.raises(TrainingError, match=r"no file missing\.npz"):
        load_predictions(tmp_path / "missing.npz")
    (tmp_path / "text.npz").write_text("not an archive")
    with pytest.raises(TrainingError, match=r"no \.npz file of plain arrays"):
        load_predictions(tmp_path / "text.npz")
    np.save(tmp_path / "one.npy", logits())
    with pytest.raises(TrainingError, match="one array"):
        load_predictions(tmp_path / "one.npy")
    np.savez(tmp_path / "objects.npz", service_logits=np.array([{}], dtype=object))
    with pytest.raises(TrainingError, match="objects are refused"):
        load_predictions(tmp_path / "objects.npz")
    whole = saved(tmp_path, **good()).read_bytes()
    (tmp_path / "half.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(TrainingError):
        load_predictions(tmp_path / "half.npz")


def test_a_split_is_disjoint_complete_and_repeats():
    rows = Predictions.check(softmax(logits(101)), softmax(logits(101, seed=1)), np.arange(101) % 4)
    first, second = rows.split(0.3, seed=4)
    assert (first.n_rows, second.n_rows) == (71, 30)
    joined = np.concatenate([first.service, second.service])
    assert len(np.unique(joined, axis=0)) == 101
    again, _ = rows.split(0.3, seed=4)
    np.testing.assert_array_equal(first.service, again.service)
    assert rows.split(0.3, seed=5)[0].service.tolist() != first.service.tolist()
