"""Read `.npy` and `.npz` files that somebody else made: only what is used, and only what a file can hold.

numpy believes what a file says about itself: a header of 80 bytes that claims 1e13 numbers is a `MemoryError`,
and a megabyte of zip becomes a gigabyte in memory, for members that nobody asked for.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from fides_plugins.errors import InputError

#: Bytes in memory of all arrays that are read from one file.
MAX_BYTES = 64 * 1024**3
#: How many times its bytes in the file an array may have in memory, and how many bytes are allowed in any case.
MAX_RATIO = 200
ALWAYS_ALLOWED_BYTES = 64 * 1024**2

_REMEDY = "Save plain arrays with numpy.savez(FILE, NAME=ARRAY, ...); objects are refused."
_NPY_REMEDY = "Save one plain array with numpy.save(FILE, ARRAY); objects are refused."
_PACKED = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_ENCRYPTED = 1
_format: Any = np.lib.format


@dataclass(frozen=True)
class ArrayArchive:
    """An opened `.npz` file: the names of its arrays, and those that are asked for."""

    name: str
    names: frozenset[str]
    _members: dict[str, list[zipfile.ZipInfo]]
    _zipped: zipfile.ZipFile

    def read(self, *names: str) -> dict[str, NDArray[Any]]:
        """The arrays with these names; those that are not there are left out.

        Raises
        ------
        InputError
            If one cannot be read, or they claim more memory than such a file may.
        """
        chosen = {name: self._members[name] for name in names if name in self._members}
        for name, infos in chosen.items():
            if len(infos) > 1:
                raise InputError(f"{self.name} holds `{name}` twice.", _REMEDY)
            if infos[0].flag_bits & _ENCRYPTED:
                raise InputError(f"{self.name} holds `{name}` encrypted.", "Save it without a password.")
            if infos[0].compress_type not in _PACKED:
                raise InputError(f"{self.name} holds `{name}` in a packing that numpy does not write.", _REMEDY)
        members = {name: infos[0] for name, infos in chosen.items()}
        claimed = sum(info.file_size for info in members.values())
        packed = sum(info.compress_size for info in members.values())
        if claimed > min(MAX_BYTES, max(ALWAYS_ALLOWED_BYTES, MAX_RATIO * packed)):
            raise InputError(
                f"{self.name} claims {claimed:,} bytes in {packed:,}.",
                f"At most {MAX_BYTES // 1024**3} GiB are read, and {MAX_RATIO} times the bytes in the file; "
                "numpy.savez does not compress.",
            )
        arrays = {}
        for name, info in members.items():
            with _told(self.name, _REMEDY, "no .npz file of plain arrays"), self._zipped.open(info) as stream:
                arrays[name] = _array(stream, info.file_size, f"{self.name}: `{name}`")
        return arrays


@contextmanager
def open_npz(path: Path) -> Iterator[ArrayArchive]:
    """Open an `.npz` file; its arrays can be read while the context is open.

    Raises
    ------
    InputError
        If it is none.
    """
    _require_file(path)
    with _told(path.name, _REMEDY, "no .npz file of plain arrays"):
        with path.open("rb") as stream:
            if stream.read(6) == _format.MAGIC_PREFIX:
                raise InputError(f"{path.name} holds one array, not an archive.", _REMEDY)
        zipped = zipfile.ZipFile(path)
    with zipped:
        members: dict[str, list[zipfile.ZipInfo]] = {}
        for info in zipped.infolist():
            members.setdefault(info.filename.removesuffix(".npy"), []).append(info)
        yield ArrayArchive(path.name, frozenset(members), members, zipped)


def read_npy(path: Path) -> NDArray[Any]:
    """The array of an `.npy` file.

    Raises
    ------
    InputError
        If it is none, holds objects, or is not as long as it claims.
    """
    _require_file(path)
    with _told(path.name, _NPY_REMEDY, "no readable .npy array"), path.open("rb") as stream:
        return _array(stream, path.stat().st_size, path.name)


def _require_file(path: Path) -> None:
    # A pipe or a device would be read for ever.
    if not path.is_file():
        raise InputError(f"There is no file {path.name}.", "Check the path.")


@contextmanager
def _told(name: str, remedy: str, what: str) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{name} cannot be read: {error.strerror or error}.", remedy) from None
    # A damaged file makes the readers raise nearly anything: zip, zlib, end-of-file and even tokenizer errors.
    except Exception as error:
        raise InputError(f"{name} cannot be read: it is {what} ({type(error).__name__}).", remedy) from None


def _array(stream: IO[bytes], size: int, what: str) -> NDArray[Any]:
    """One array of `size` bytes with its header, which is compared with the size before anything is allocated."""
    version = _format.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise InputError(f"{what} has fields with names.", _REMEDY)
    header = _format.read_array_header_1_0 if version == (1, 0) else _format.read_array_header_2_0
    shape, _, dtype = header(stream)
    if dtype.hasobject:
        raise InputError(f"{what} holds Python objects.", _REMEDY)
    items = 1
    for length in shape:
        items *= length
    held = size - stream.tell()
    if dtype.itemsize == 0 or min(shape, default=0) < 0 or items * dtype.itemsize != held:
        raise InputError(f"{what} claims {items:,} numbers of {dtype}, and has {held:,} bytes.", _REMEDY)
    stream.seek(0)
    array: NDArray[Any] = _format.read_array(stream, allow_pickle=False)
    return array
