"""Reading, shaping and splitting of training data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fides_plugins.bundle import InputSpec
from fides_plugins.errors import TrainingError
from fides_plugins.training.data import Dataset, image_layout, load_data, match_input, split_rows

SPEC = InputSpec(name="x", dtype="float32", shape=(None, 1, 8, 8))


def test_npz_round_trip(tmp_path: Path) -> None:
    images = np.random.default_rng(0).random((5, 1, 8, 8), dtype=np.float32)
    np.savez(tmp_path / "d.npz", images=images, labels=np.arange(5), class_names=list("abcde"))
    data = load_data(tmp_path / "d.npz")
    assert np.array_equal(data.images, images)
    assert data.labels is not None
    assert data.labels.tolist() == [0, 1, 2, 3, 4]
    assert data.class_names == tuple("abcde")
    assert data.digest == Dataset(images, np.arange(5)).digest != Dataset(images).digest


def test_the_rows_may_have_any_name_and_of_several_that_of_the_input(tmp_path: Path) -> None:
    rows, other = np.zeros((2, 3)), np.ones((2, 4))
    np.savez(tmp_path / "d.npz", pictures=rows, labels=np.zeros(2, np.int64))
    assert load_data(tmp_path / "d.npz").images.shape == (2, 3)
    np.savez(tmp_path / "d.npz", pixels=rows, other=other)
    spec = InputSpec(name="other", dtype="float32", shape=(None, 4))
    assert load_data(tmp_path / "d.npz", spec).images.shape == (2, 4)


def test_several_arrays_of_which_none_is_the_input_are_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", pictures=np.zeros((2, 3)), more=np.zeros((2, 3)))
    with pytest.raises(TrainingError, match=r"more.*pictures.*none of these arrays.*numpy.savez"):
        load_data(tmp_path / "d.npz")


def test_pickled_objects_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", images=np.array([{"a": 1}], dtype=object))
    with pytest.raises(TrainingError, match="objects are refused"):
        load_data(tmp_path / "d.npz")


def test_file_that_is_no_archive(tmp_path: Path) -> None:
    (tmp_path / "d.npz").write_bytes(b"not a zip")
    with pytest.raises(TrainingError, match="cannot be read"):
        load_data(tmp_path / "d.npz")


def test_missing_path(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="no data"):
        load_data(tmp_path / "nothing.npz")


def test_folder_by_class_is_resized_to_the_service(tmp_path: Path) -> None:
    for name, grey in (("cat", 0), ("dog", 255)):
        (tmp_path / name).mkdir()
        for i in range(2):
            Image.new("RGB", (20, 10), (grey,) * 3).save(tmp_path / name / f"{i}.png")
    (tmp_path / "dog" / "notes.txt").write_text("not a picture")
    data = load_data(tmp_path, SPEC)
    assert data.images.shape == (4, 1, 8, 8)
    assert data.class_names == ("cat", "dog")
    assert data.labels is not None
    assert data.labels.tolist() == [0, 0, 1, 1]
    shaped, scale = match_input(data, SPEC)
    assert scale == pytest.approx(1 / 255)
    assert shaped.images.dtype == np.float32
    assert shaped.images[2:].min() == pytest.approx(1.0)


def test_folder_for_channels_last(tmp_path: Path) -> None:
    Image.new("RGB", (9, 9), (10, 20, 30)).save(tmp_path / "a.png")
    data = load_data(tmp_path, InputSpec(name="x", dtype="uint8", shape=(None, 8, 8, 3)))
    assert data.labels is None
    assert data.images.shape == (1, 8, 8, 3)
    assert data.images[0, 0, 0].tolist() == [10, 20, 30]


def test_damaged_picture_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"\x89PNG but no")
    with pytest.raises(TrainingError, match=r"a\.png"):
        load_data(tmp_path, SPEC)


def test_channel_axis_is_added() -> None:
    shaped, scale = match_input(Dataset(np.ones((3, 8, 8), np.float64)), SPEC)
    assert shaped.images.shape == (3, 1, 8, 8)
    assert shaped.images.dtype == np.float32
    assert scale == 1.0


def test_wrong_shape_is_refused() -> None:
    with pytest.raises(TrainingError, match=r"\(1, 9, 9\)"):
        match_input(Dataset(np.ones((3, 1, 9, 9), np.float32)), SPEC)


def test_floats_are_not_cut_to_integers() -> None:
    with pytest.raises(TrainingError, match="uint8"):
        match_input(Dataset(np.ones((3, 4), np.float32)), InputSpec(name="x", dtype="uint8", shape=(None, 4)))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_bad_rows_are_named(value: float) -> None:
    images = np.zeros((4, 3), np.float32)
    images[2, 1] = value
    with pytest.raises(TrainingError, match="row 2"):
        Dataset(images)


def test_labels_out_of_range_are_named() -> None:
    data = Dataset(np.zeros((3, 2), np.float32), np.array([0, 7, -1]))
    with pytest.raises(TrainingError, match="first is row 1 with label 7"):
        data.check_labels(5)


def test_class_names_must_fit_the_service() -> None:
    with pytest.raises(TrainingError, match="name 2 classes, the service has 3"):
        Dataset(np.zeros((3, 2), np.float32), None, ("a", "b")).check_labels(3)


def test_split_is_disjoint_complete_and_repeatable() -> None:
    images = np.random.default_rng(0).random((200, 3))
    shares = {"a": 0.5, "b": 0.2, "c": 0.3}
    parts = split_rows(images, shares, 3)
    assert sorted(np.concatenate(list(parts.values())).tolist()) == list(range(200))
    assert [len(parts[k]) for k in shares] == [100, 40, 60]
    again = split_rows(images, shares, 3)
    assert all(np.array_equal(parts[k], again[k]) for k in shares)
    assert not np.array_equal(parts["a"], split_rows(images, shares, 4)["a"])


def test_duplicates_stay_in_one_part() -> None:
    base = np.random.default_rng(1).random((50, 4))
    images = np.concatenate([base, base, base])
    parts = split_rows(images, {"a": 0.5, "b": 0.5}, 0)
    of_a, of_b = ({row.tobytes() for row in images[parts[k]]} for k in ("a", "b"))
    assert not of_a & of_b


def test_too_few_rows_to_split() -> None:
    with pytest.raises(TrainingError, match="1 distinct rows"):
        split_rows(np.zeros((10, 2)), {"a": 0.5, "b": 0.5}, 0)


@pytest.mark.parametrize(
    ("shape", "channels", "last"),
    [((None, 3, 8, 9), 3, False), ((None, 8, 9, 3), 3, True), ((None, 8, 9), 1, False), ((None, 1, 8, 1), 1, False)],
)
def test_layouts(shape: tuple[int | None, ...], channels: int, last: bool) -> None:
    layout = image_layout(shape)
    assert layout is not None
    assert (layout.channels, layout.channels_last) == (channels, last)
    assert image_layout((None, 40)) is None
