"""Changed copies stay what rows of their kind can be."""

from __future__ import annotations

import numpy as np
import pytest

from fides_plugins.training.distil.augmentation import Augmentation, augment, changes
from fides_plugins.training.kinds import padding
from tests.unit.training.test_kinds import files, speech, words


@pytest.mark.parametrize("kind", ["tokens", "bytes"])
def test_copies_of_sequences_hold_no_symbol_that_a_row_did_not_hold(kind: str):
    # Before, they got Gaussian noise and were blended: ids became other ids.
    rows = words() if kind == "tokens" else files()
    fill = padding(rows)
    for name in ("drop", "shift", "crop"):
        shown, _, origins = augment(rows, None, 1, 0, Augmentation().only([name]), kind)  # type: ignore[arg-type]
        assert shown.dtype == rows.dtype
        assert np.array_equal(origins[:, 0], origins[:, 1])
        for before, after in zip(rows, shown[len(rows) :], strict=True):
            assert set(after.tolist()) <= {*before.tolist(), fill}, name
        assert 0.5 < (shown[len(rows) :] == rows).mean() < 1.0 or name == "shift"
    spliced, _, origins = augment(rows, None, 1, 0, Augmentation().only(["splice"]), kind)  # type: ignore[arg-type]
    for after, (own, other) in zip(spliced[len(rows) :], origins[len(rows) :], strict=True):
        assert ((after == rows[own]) | (after == rows[other])).all()


def test_a_shift_moves_everything_alike():
    rows = np.arange(40, dtype=np.int32)[None].repeat(30, 0)
    shown, _, _ = augment(rows, None, 1, 0, Augmentation().only(["shift"]), "tokens")
    for after in shown[30:]:
        kept = after[after != 0]
        assert np.array_equal(np.diff(kept), np.ones(len(kept) - 1))
        assert len(kept) >= 35


def test_a_table_stays_within_its_columns_and_codes_stay_codes():
    rng = np.random.default_rng(0)
    rows = np.column_stack([rng.lognormal(0, 3, 500), rng.integers(0, 4, 500) * 10.0, rng.normal(size=500)])
    rows[::7, 2] = np.nan
    shown, _, _ = augment(rows, None, 3, 0, kind="vector")
    assert set(np.unique(shown[:, 1])) == {0.0, 10.0, 20.0, 30.0}
    assert np.nanmin(shown[:, 0]) >= rows[:, 0].min()
    assert np.nanmax(shown[:, 0]) <= rows[:, 0].max()
    assert np.isnan(shown[:, 2]).any()


def test_sound_is_moved_made_louder_and_hissed_at_but_stays_sound():
    rows = speech()
    for name in changes("audio", rows, Augmentation()):
        shown, _, _ = augment(rows, None, 1, 0, Augmentation().only([name]), "audio")
        after = shown[len(rows) :]
        assert after.dtype == np.float32
        assert not np.array_equal(after, rows)
        assert 0.3 < after.std() / rows.std() < 3, name


def test_no_change_is_no_copy():
    rows = files()
    shown, _, _ = augment(rows, None, 3, 0, Augmentation().only([]), "bytes")
    assert np.array_equal(shown, rows)
