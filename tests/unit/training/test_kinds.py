"""The kind of input is found from the rows themselves: real files, real pictures, a real table, and made sound."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_breast_cancer, load_digits, load_wine

from fides_plugins.errors import TrainingError
from fides_plugins.training.kinds import Kind, check_kind, describe, input_kind, padding
from tests.support.docs_blocks import REPOSITORY

RNG = np.random.default_rng(0)


def files(length: int = 512) -> np.ndarray:
    """The beginnings of this repository's own files as bytes, with 256 as padding."""
    rows = []
    for path in sorted([*REPOSITORY.rglob("docs/**/*.md"), *REPOSITORY.rglob("tests/**/*.py")])[:120]:
        data = path.read_bytes()[:length]
        rows.append([*data, *[256] * (length - len(data))])
    return np.array(rows, np.int32)


def words(length: int = 64) -> np.ndarray:
    """Words of the docs as ids by rank, as a tokeniser gives them, padded with 0."""
    text = " ".join(p.read_text(encoding="utf-8") for p in sorted(Path(REPOSITORY, "docs").rglob("*.md"))).split()
    known = {word: 1 + i for i, word in enumerate(dict.fromkeys(text))}
    ids = np.array([known[word] for word in text], np.int64)
    rows = np.zeros((150, length), np.int64)
    for row in rows:
        size, start = RNG.integers(8, length), RNG.integers(len(ids) - length)
        row[:size] = ids[start : start + size]
    return rows


def speech(samples: int = 4000) -> np.ndarray:
    """Tones with harmonics, pauses and hiss, at 8 kHz."""
    time = np.arange(samples) / 8000
    pitch = RNG.uniform(90, 250, (60, 1))
    loud = np.abs(np.sin(2 * np.pi * RNG.uniform(2, 5, (60, 1)) * time + RNG.uniform(0, 6, (60, 1))))
    tones = sum(np.sin(2 * np.pi * pitch * h * time + h) / h for h in (1, 2, 3))
    return (loud * tones + 0.02 * RNG.standard_normal((60, samples))).astype(np.float32)


CASES: dict[str, tuple[np.ndarray, Kind]] = {
    "pictures": (load_digits().images[:, None].astype(np.float32), "image"),
    "pictures, channels last": (np.zeros((4, 32, 32, 3), np.uint8), "image"),
    "pictures without channels": (load_digits().images, "image"),
    "flat pictures": (load_digits().data.astype(np.float32), "vector"),
    "flat pictures of bytes": (
        np.repeat(np.repeat(load_digits().images, 3, 1), 3, 2).reshape(1797, -1).astype(np.uint8),
        "vector",
    ),
    "table": (load_breast_cancer().data.astype(np.float32), "vector"),
    "small table of codes": (RNG.integers(0, 5, (300, 9)), "vector"),
    "wide table of codes": (
        np.hstack([RNG.integers(0, 3 ** (1 + i % 4), (300, 1)) + 50 * i for i in range(30)]),
        "vector",
    ),
    "wine": (load_wine().data, "vector"),
    "files": (files(), "bytes"),
    "words": (words(), "tokens"),
    "sound": (speech(), "audio"),
    "normalised features": (RNG.standard_normal((300, 768)).astype(np.float32), "vector"),
}


@pytest.mark.parametrize("name", CASES)
def test_the_kind_is_found(name: str):
    rows, kind = CASES[name]
    assert input_kind(rows) == kind
    assert describe(kind, rows).startswith("The inputs are ")
    assert check_kind(kind, rows) == kind


def test_what_fills_sequences_up_is_found():
    assert padding(files()) == 256
    assert padding(words()) == 0


def test_a_kind_that_the_rows_cannot_be_is_refused():
    with pytest.raises(TrainingError, match=r"no kind of input 'picture'.*image, vector, tokens"):
        check_kind("picture", files())
    with pytest.raises(TrainingError, match="are no images"):
        check_kind("image", files())
    with pytest.raises(TrainingError, match=r"\(30,\) and dtype float32 are no tokens"):
        check_kind("tokens", load_breast_cancer().data.astype(np.float32))
