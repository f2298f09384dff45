"""Files of arrays that strangers made: nothing is allocated that the file does not hold, and what is wrong is said."""

from __future__ import annotations

import io
import os
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fides_plugins.array_files import open_npz, read_npy
from fides_plugins.cli.infer import _tensor
from fides_plugins.cli.triton import _read_data
from fides_plugins.errors import FidesError, InputError
from fides_plugins.testing import make_bundle
from fides_plugins.training.data import load_data
from fides_plugins.training.predictions import load_predictions

ROWS = np.full((20, 4), 0.25, np.float32)
NAMES = ("images", "service_probabilities", "verification_probabilities")
#: Everything that reads an .npz file which somebody gave it.
READERS: dict[str, Callable[[Path], Any]] = {
    "fit": load_data,
    "predictions": load_predictions,
    "check": _read_data,
}


def npy(array: Any = ROWS, **header: Any) -> bytes:
    """The bytes of an array, with some of its header changed."""
    buffer = io.BytesIO()
    described = {**np.lib.format.header_data_from_array_1_0(array), **header}
    np.lib.format.write_array_header_1_0(buffer, described)
    return buffer.getvalue() + array.tobytes()


def archive(path: Path, packing: int = zipfile.ZIP_DEFLATED, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w", packing) as out:
        for name in NAMES:
            out.writestr(f"{name}.npy", members.pop(name, npy()))
        for name, data in members.items():
            out.writestr(f"{name}.npy", data)
    return path


def encrypted(path: Path) -> Path:
    """An archive whose members say that they are encrypted."""
    data = bytearray(archive(path).read_bytes())
    for signature, place in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        position = data.find(signature)
        while position >= 0:
            data[position + place] |= 1
            position = data.find(signature, position + 1)
    path.write_bytes(data)
    return path


def twice(path: Path) -> Path:
    archive(path)
    with zipfile.ZipFile(path, "a") as out:
        for name in NAMES:
            with pytest.warns(UserWarning, match="Duplicate"):
                out.writestr(f"{name}.npy", npy())
    return path


def everywhere(data: bytes) -> dict[str, bytes]:
    return dict.fromkeys(NAMES, data)


HUGE = (10**13,)
HOSTILE: dict[str, Callable[[Path], Path]] = {
    "a header of 1e13 numbers": lambda path: archive(path, **everywhere(npy(shape=HUGE))),
    "a header of 1e13 numbers of no size": lambda path: archive(path, **everywhere(npy(shape=HUGE, descr="|V0"))),
    "a negative shape": lambda path: archive(path, **everywhere(npy(shape=(-20, -4)))),
    "a header that is code": lambda path: archive(path, **everywhere(npy().replace(b"(20, 4)", b"exit(0)"))),
    "an odd version": lambda path: archive(path, **everywhere(b"\x93NUMPY\x09\x00" + npy()[8:])),
    "too few bytes": lambda path: archive(path, **everywhere(npy()[:-8])),
    "no array": lambda path: archive(path, **everywhere(b"hello")),
    "objects": lambda path: archive(path, **everywhere(npy(descr="|O"))),
    "zeros without end": lambda path: archive(path, **everywhere(npy(np.zeros((100, 300_000), np.float32)))),
    "encrypted members": encrypted,
    "members twice": twice,
    "an odd packing": lambda path: archive(path, zipfile.ZIP_BZIP2),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_archive_is_an_error_without_its_memory(tmp_path: Path, kind: str, reader: str) -> None:
    file = HOSTILE[kind](tmp_path / "data.npz")
    tracemalloc.start()
    try:
        with pytest.raises(FidesError, match=r"data\.npz") as caught:
            READERS[reader](file)
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()
    assert caught.value.remedy


@pytest.mark.parametrize("reader", ["fit", "predictions"])
@pytest.mark.parametrize(
    "unused", [npy(np.zeros((1000, 300_000), np.uint8)), npy(shape=HUGE), b"hello"], ids=["zeros", "1e13", "no array"]
)
def test_members_that_nobody_uses_are_not_read(tmp_path: Path, unused: bytes, reader: str) -> None:
    file = archive(tmp_path / "data.npz", unused=unused)
    tracemalloc.start()
    found = READERS[reader](file)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.n_rows == 20
    assert peak < 20e6


def test_what_compresses_well_is_read(tmp_path: Path) -> None:
    """One-hot rows and black pictures are honest data: up to a limit, the ratio does not matter."""
    np.savez_compressed(tmp_path / "data.npz", images=np.zeros((1000, 8, 8), np.float32), other=np.eye(3))
    with open_npz(tmp_path / "data.npz") as opened:
        assert opened.names == {"images", "other"}
        found = opened.read("other", "absent")
        assert opened.read("images")["images"].shape == (1000, 8, 8)
    np.testing.assert_array_equal(found.pop("other"), np.eye(3))
    assert not found


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["f4", "f8", "u1", "i8", "U5", "?", ">f4"])
def test_plain_arrays_come_as_they_are(tmp_path: Path, dtype: str, order: Any) -> None:
    array = np.asarray(np.arange(12).reshape(3, 4), dtype, order=order)
    np.savez(tmp_path / "data.npz", x=array, scalar=array[0, 0], none=array[:0])
    np.save(tmp_path / "x.npy", array)
    with open_npz(tmp_path / "data.npz") as opened:
        found = opened.read("x", "scalar", "none")
    for name, expected in (("x", array), ("scalar", array[0, 0]), ("none", array[:0])):
        np.testing.assert_array_equal(found[name], expected)
        assert found[name].dtype == expected.dtype
    np.testing.assert_array_equal(read_npy(tmp_path / "x.npy"), array)


@pytest.mark.parametrize(
    "data",
    [npy(shape=HUGE), npy(shape=(21, 4)), npy(descr="|O"), npy()[:-1], npy() + b"more", b"hello", b""],
    ids=["1e13", "one row more", "objects", "cut off", "more behind", "no array", "nothing"],
)
def test_a_hostile_array_for_infer_is_an_error(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "rows.npy").write_bytes(data)
    with pytest.raises(InputError, match=r"rows\.npy") as caught:
        _tensor(tmp_path / "rows.npy", make_bundle(tmp_path / "bundle", 4), 0.0, 1.0)
    assert caught.value.remedy


def test_a_pipe_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "data.npz")
    os.mkfifo(tmp_path / "rows.npy")
    begin = time.monotonic()
    for read in (READERS["predictions"], READERS["check"], read_npy):
        with pytest.raises(FidesError, match="no file"):
            read(tmp_path / ("rows.npy" if read is read_npy else "data.npz"))
    assert time.monotonic() - begin < 5
